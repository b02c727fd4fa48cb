"""A queen's models: its own disk, and what the hives of other nodes tell, over real HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from rbee.client import AsyncClient
from rbee.errors import ConflictError, NotFoundError, RbeeError
from rbee.home import Home
from rbee.queen.aliases import Aliases
from rbee.queen.app import make_app
from rbee.queen.hive import Hive
from rbee.queen.machine import QueenSetup
from rbee.queen.machines import Machines
from rbee.queen.openai import Passages
from rbee.testing.tiny_model import write_tiny_model
from rbee.web.listener import open_listener
from rbee.web.narrated import Works
from rbee.web.router import App, Emit, Request, Stream
from rbee.web.server import serve_http
from rbee.wire import messages, sse
from rbee.wire.messages import HiveInfo, Narration, PullModel
from tests.hive.test_catalog import TOKEN, open_hive, put
from tests.models.conftest import used


@attrs.define
class FakeHives:
    """Hives that run, by node; ``wanted`` notes which were asked for to be started."""

    machines: Machines
    hives: dict[str, Hive] = attrs.field(factory=dict)
    wanted: list[str] = attrs.field(factory=list)

    def add(self, node: str, client: Any) -> None:
        info = HiveInfo(node, f"hive-{node}", str(client.base_url), "ready", "queen-1", 1, "0")
        self.hives[node] = Hive(info, True, TOKEN, client)

    def infos(self) -> list[HiveInfo]:
        return [hive.info for hive in self.hives.values()]

    def running(self, node: str) -> Hive | None:
        return self.hives.get(node)

    async def get(self, node: str, narrate: Any) -> Hive:
        await trio.lowlevel.checkpoint()
        self.wanted.append(node)
        if node not in self.hives:
            raise NotFoundError(f"no node {node!r}", code="unknown_node")
        narrate(Narration("queen", "start", f"a hive on {node}"))
        return self.hives[node]


@attrs.frozen
class Queen:
    client: AsyncClient
    hives: FakeHives
    far: Home


@pytest.fixture
async def far(tmp_path: Path) -> Home:
    made = Home(tmp_path / "far", tmp_path / "far-run")
    for path in (made.models, made.logs, made.run):
        path.mkdir(parents=True)
    return made


@asynccontextmanager
async def open_queen(home: Home, far: Home) -> AsyncGenerator[Queen, None]:
    """Serve a queen with two nodes while the body runs; each has a home of its own."""
    setup = QueenSetup(id="queen-1", home=home, run_dir=home.run, token=TOKEN, nonce="n")
    hives, unneeded = FakeHives(Machines(setup)), None
    works = Works(lambda: RbeeError("it stops"))
    passages = Passages(unneeded, unneeded, unneeded, unneeded, unneeded)
    app = make_app(
        setup, hives, unneeded, unneeded, works, passages, Aliases(home.config_file), unneeded
    )
    async with (
        open_hive(home, "localhost") as near_client,
        open_hive(far, "far") as far_client,
        trio.open_nursery() as nursery,
    ):
        hives.add("localhost", near_client)
        hives.add("far", far_client)
        listener = open_listener("127.0.0.1", 0, exact=True)
        url = await nursery.start(partial(serve_http, app, listener, grace=0.1))
        async with AsyncClient(url, TOKEN) as client:
            yield Queen(client, hives, far)
        nursery.cancel_scope.cancel()


async def places(queen: Queen) -> list[tuple[str, str]]:
    return [(info.node, info.model) for info in await queen.client.models()]


async def test_the_models_of_all_nodes_are_listed_each_once(home: Home, far: Home) -> None:
    put(home, "pypi--near")
    put(far, "pypi--far")
    async with open_queen(home, far) as queen:
        both = [("far", "pypi:far"), ("localhost", "pypi:near")]
        assert await places(queen) == both
        del queen.hives.hives["localhost"]  # its own disk needs no hive
        assert await places(queen) == both
        assert queen.hives.wanted == []


async def test_a_node_that_does_not_answer_hides_no_others(home: Home, far: Home) -> None:
    put(home, "pypi--near")
    async with open_queen(home, far) as queen:
        queen.hives.hives["far"].client = Refusing()
        assert await places(queen) == [("localhost", "pypi:near")]


class Refusing:
    """A client whose peer does not answer as it should."""

    is_closed = False

    async def request(self, *args: Any, **more: Any) -> Any:
        raise ConflictError("it is stopping")


@pytest.mark.parametrize("node", ["localhost", "far"])
async def test_a_model_is_removed_from_its_node_only(home: Home, far: Home, node: str) -> None:
    place = {"localhost": home, "far": far}[node]
    put(home)
    put(far)
    async with open_queen(home, far) as queen:
        with used(place, "pypi--tiny"), pytest.raises(ConflictError) as caught:
            await queen.client.remove_model("pypi--tiny", node=node)
        assert caught.value.code == "model_in_use"
        await queen.client.remove_model("pypi--tiny", node=node)
        assert [other for other, _ in await places(queen)] == [
            other for other in ("far", "localhost") if other != node
        ]
        with pytest.raises(NotFoundError):
            await queen.client.remove_model("pypi--tiny", node=node)
        assert "localhost" not in queen.hives.wanted


async def test_a_model_of_an_unknown_node_is_not_found(home: Home, far: Home) -> None:
    async with open_queen(home, far) as queen:
        with pytest.raises(NotFoundError, match="no node 'nowhere'"):
            await queen.client.remove_model("x", node="nowhere")
        with pytest.raises(RbeeError, match="no node 'nowhere'"):
            await queen.client.pull(PullModel("x", "nowhere"))


@pytest.mark.parametrize("node", [None, "far"])
async def test_a_pull_is_its_nodes_hives(
    home: Home, far: Home, tmp_path: Path, node: str | None
) -> None:
    told: list[str] = []
    tiny = write_tiny_model(tmp_path / "tiny")

    async def narrate(narration: Narration) -> None:
        told.append(narration.text)

    async with open_queen(home, far) as queen:
        pulled = await queen.client.pull(PullModel(str(tiny), node), narrate)
        assert pulled.directory == str(tiny)
        assert told == [f"a hive on {node or 'localhost'}"]
        with pytest.raises(RbeeError, match="no model is called") as caught:
            await queen.client.pull(PullModel("no-such-model", node))
        assert caught.value.code == "unknown_model"


async def test_a_hive_that_ends_in_the_middle_of_a_pull_is_an_error(home: Home, far: Home) -> None:
    async def half(request: Request) -> Stream:
        async def run(emit: Emit) -> None:
            await emit(sse.encode(Narration("hive", "fetch", "half of it", 0.5)))

        return Stream(run)

    app = App(token=TOKEN)
    app.add("POST", messages.HIVE_MODELS, half)
    async with open_queen(home, far) as queen, trio.open_nursery() as nursery:
        listener = open_listener("127.0.0.1", 0, exact=True)
        url = await nursery.start(partial(serve_http, app, listener, grace=0.1))
        queen.hives.hives["far"].client.base_url = url
        with pytest.raises(RbeeError, match="ended before the model was there"):
            await queen.client.pull(PullModel("x", "far"))
        nursery.cancel_scope.cancel()


async def test_an_alias_means_on_a_node_what_it_means_to_the_queen(
    home: Home, far: Home, tmp_path: Path
) -> None:
    tiny = write_tiny_model(tmp_path / "tiny")
    home.config_file.write_text(f"[aliases]\nmini = '{tiny}'\ngone = '/no/such/model'\n")
    far.config_file.write_text(f"[aliases]\nmini = '/nowhere'\nown = '{tiny}'\n")
    async with open_queen(home, far) as queen:
        for name in ("mini", "own"):  # the second is known there only
            assert (await queen.client.pull(PullModel(name, "far"))).directory == str(tiny)
        with pytest.raises(RbeeError) as caught:
            await queen.client.pull(PullModel("gone", "far"))
        assert caught.value.message.startswith("node far: there is no model at /no/such/model")
        assert caught.value.hint == "ls /   # on far"
