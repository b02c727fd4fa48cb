"""A hive's routes for models, over real HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from rbee.errors import BadInputError, ConflictError, NotFoundError
from rbee.hive import catalog as module
from rbee.hive.app import make_app
from rbee.hive.workers import HiveSetup
from rbee.home import Home
from rbee.models.catalog import Catalog, Entry, File
from rbee.testing.tiny_model import write_tiny_model
from rbee.web.client import call, open_client, open_events
from rbee.web.listener import open_listener
from rbee.web.server import serve_http
from rbee.wire import messages
from rbee.wire.messages import ModelInfo, PullModel
from tests.models.conftest import used

TOKEN = "secret"


@asynccontextmanager
async def open_hive(home: Home, node: str = "n1") -> AsyncGenerator[httpx.AsyncClient, None]:
    """Serve a hive's app while the body runs; its models need no workers."""
    unneeded: Any = None
    setup = HiveSetup(id="hive-1", home=home, run_dir=home.run, token=TOKEN, node=node)
    app = make_app(setup, unneeded, unneeded, unneeded, unneeded)
    async with trio.open_nursery() as nursery:
        listener = open_listener("127.0.0.1", 0, exact=True)
        url = await nursery.start(partial(serve_http, app, listener, grace=0.1))
        async with open_client(url, TOKEN) as client:
            yield client
        nursery.cancel_scope.cancel()


def put(home: Home, name: str = "pypi--tiny") -> None:
    (home.models / name).mkdir()
    (home.models / name / "x").write_text("12")
    entry = Entry(name.replace("--", ":"), "pypi", "1", (File("x", 2),), "float32")
    Catalog(home.models).save(name, entry)


async def models(client: httpx.AsyncClient) -> list[ModelInfo]:
    return await call(client, "GET", messages.HIVE_MODELS, list[ModelInfo], what="hive")


async def remove(client: httpx.AsyncClient, name: str) -> None:
    await call(client, "DELETE", f"{messages.HIVE_MODELS}/{name}", type(None), what="hive")


async def pull(client: httpx.AsyncClient, model: str) -> list[tuple[str, str]]:
    opened = open_events(client, "POST", messages.HIVE_MODELS, PullModel(model), what="hive")
    async with opened as events:
        return [event async for event in events]


async def test_the_models_of_a_machine_are_listed_with_its_name(home: Home) -> None:
    put(home)
    async with open_hive(home) as client:
        with used(home, "pypi--tiny"):
            (info,) = await models(client)
        assert (info.model, info.node, info.in_use) == ("pypi:tiny", "n1", True)
        assert "no config.json" in info.damage


async def test_a_model_is_removed_unless_it_is_in_use_or_not_there(home: Home) -> None:
    put(home, "pypi--tiny--1.0+cpu")
    async with open_hive(home) as client:
        with used(home, "pypi--tiny--1.0+cpu"), pytest.raises(ConflictError) as caught:
            await remove(client, "pypi--tiny--1.0+cpu")
        assert caught.value.code == "model_in_use"
        await remove(client, "pypi--tiny--1.0+cpu")
        assert await models(client) == []
        with pytest.raises(NotFoundError):
            await remove(client, "pypi--tiny--1.0+cpu")
        with pytest.raises(NotFoundError):
            await remove(client, "..")


async def test_a_pull_ends_with_the_directory(home: Home, tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny")
    async with open_hive(home) as client:
        (last,) = await pull(client, str(tiny))
        assert last[0] == "pulled"
        assert str(tiny) in last[1]


async def test_a_pull_that_fails_ends_with_the_error(home: Home) -> None:
    async with open_hive(home) as client:
        (last,) = await pull(client, "no-such-model")
        assert last[0] == "error"
        assert '"code":"unknown_model"' in last[1]
        with pytest.raises(BadInputError):
            await call(client, "POST", messages.HIVE_MODELS, type(None), {"modle": 1}, what="hive")


async def test_a_pull_tells_what_it_does_and_ends_with_its_reader(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = trio.Event()

    async def run(argv: Sequence[str], *, log: Path, **_: Any) -> int:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    monkeypatch.setattr(module, "_run", run)
    request = PullModel("pypi:some-model")
    with trio.fail_after(10):
        async with open_hive(home) as client:
            async with open_events(
                client, "POST", messages.HIVE_MODELS, request, what="hive"
            ) as events:
                name, data = await anext(events)
                assert name == "narration"
                assert "some-model" in data
                assert not ended.is_set()
            await ended.wait()
    assert [path.name for path in home.models.rglob("*") if path.name[0] != "."] == []


async def test_a_download_has_the_token_that_the_hive_was_started_with(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "mine")
    argv = ["/bin/sh", "-c", 'test "$HF_TOKEN" = mine']
    assert await module._run(argv, log=home.log_file("download")) == 0
