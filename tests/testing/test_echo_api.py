from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from rbee.model import WorkerId, WorkerSpec
from rbee.testing.echo_engine import EchoEngineKind
from rbee.worker.engine import Engine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@asynccontextmanager
async def open_api(
    tmp_path: Path, model: str = "echo?rate=5000"
) -> AsyncGenerator[tuple[httpx.AsyncClient, Engine], None]:
    spec = WorkerSpec(WorkerId("worker-1"), model, engine="echo", served_names=("parrot",))
    opened = EchoEngineKind().open(spec, run_dir=str(tmp_path), progress=lambda *_: None)
    async with opened as engine:
        transport = httpx.ASGITransport(app=engine.app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://echo") as client:
            yield client, engine


def said(**more: object) -> dict[str, Any]:
    messages = [{"role": "user", "content": [{"type": "text", "text": "one two"}]}]
    return {"model": "parrot", "messages": messages, "max_tokens": 3, **more}


def events(body: str) -> list[Any]:
    *lines, last = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(line) for line in lines]


async def test_a_chat_is_answered_whole_or_in_pieces(tmp_path: Path) -> None:
    async with open_api(tmp_path) as (client, _):
        whole = (await client.post(CHAT, json=said())).json()
        pieces = events((await client.post(CHAT, json=said(stream=True))).text)
    [choice] = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": "one two one"}
    assert choice["finish_reason"] == "length"
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert (whole["object"], whole["model"], whole["usage"]) == ("chat.completion", "parrot", usage)
    texts = [piece["choices"][0]["delta"]["content"] for piece in pieces]
    assert texts == ["one", " two", " one"]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None, None, "length"]
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}


async def test_a_prompt_is_completed_and_usage_comes_last_if_asked_for(tmp_path: Path) -> None:
    asked = {"model": "parrot", "prompt": "a b", "max_tokens": 2}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with open_api(tmp_path) as (client, _):
        assert (await client.post(TEXT, json=asked)).json()["choices"][0]["text"] == "a b"
        *_, last = events((await client.post(TEXT, json=asked | options)).text)
        models = (await client.get("/v1/models")).json()["data"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)
    assert [model["id"] for model in models] == ["echo?rate=5000", "parrot"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, b"{", 400),
        (CHAT, b'{"model": "m", "messages": [{}]}', 400),
        (CHAT, b'{"model": "m", "messages": []}', 400),
        (TEXT, b'{"model": "m", "prompt": "a", "max_tokens": 9999999}', 400),
        ("/v1/embeddings", b"{}", 404),
    ],
)
async def test_a_refusal_has_openais_shape(
    path: str, body: bytes, status: int, tmp_path: Path
) -> None:
    async with open_api(tmp_path) as (client, engine):
        answer = await client.post(path, content=body)
        assert engine.running() == 0
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == status


async def test_a_client_that_goes_ends_its_request(tmp_path: Path) -> None:
    async with open_api(tmp_path, "echo?rate=1") as (client, engine):
        with trio.move_on_after(0.1):
            await client.post(CHAT, json=said(max_tokens=100))
        assert engine.running() == 0
