"""What goes wrong on the way becomes an error of ours that names the peer."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

import httpx
import pytest
import trio

from rbee.errors import (
    ConflictError,
    InsufficientError,
    NotFoundError,
    PeerError,
    RbeeError,
    UnavailableError,
)
from rbee.trace import Trace, Tracing
from rbee.web.client import call, error_of, open_client, open_events
from rbee.web.router import error_response
from rbee.wire.messages import Message


@asynccontextmanager
async def peer(
    answer: bytes, *, reset: bool = False
) -> AsyncGenerator[tuple[str, list[bytes]], None]:
    """Answer every connection with the same bytes, then close or reset it."""
    heard: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        heard.append(await stream.receive_some())
        await stream.send_all(answer)
        if reset:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}", heard
        nursery.cancel_scope.cancel()


def http(body: bytes, status: int = 200, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, size, body)


async def get(url: str, kind: type = Message) -> object:
    async with open_client(url, "secret") as client:
        return await call(client, "GET", "/x", kind, what="the hive")


async def test_an_answer_is_typed_and_the_token_is_sent() -> None:
    async with peer(http(b'{"role": "user", "content": "hi"}')) as (url, heard):
        assert await get(url) == Message("user", "hi")
    assert b"authorization: bearer secret\r\n" in heard[0].lower()


async def test_a_body_is_sent_as_json() -> None:
    async with peer(http(b"")) as (url, heard), open_client(url) as client:
        assert await call(client, "POST", "/x", type(None), Message("u", "ü"), what="x") is None
    assert b"content-type: application/json\r\n" in heard[0].lower()
    assert b"authorization" not in heard[0].lower()


async def test_a_call_for_a_request_carries_its_id() -> None:
    async with peer(http(b"")) as (url, heard), open_client(url) as client:
        await call(client, "GET", "/x", type(None), what="the hive")
        with Tracing(Trace("mine")):
            await call(client, "GET", "/x", type(None), what="the hive")
        assert [b"x-request-id: mine\r\n" in one for one in heard] == [False, True]


async def test_nobody_listening_is_unavailable() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, not listening: refused
        with pytest.raises(UnavailableError, match="the hive does not answer") as info:
            await get(f"http://127.0.0.1:{free.getsockname()[1]}")
    assert info.value.code == "unreachable"


async def test_who_calls_after_the_client_was_closed_hears_that_the_peer_has_ended() -> None:
    async with open_client("http://127.0.0.1:1") as client:
        pass
    with pytest.raises(UnavailableError, match="the hive has ended") as caught:
        await call(client, "GET", "/x", Message, what="the hive")
    assert caught.value.code == "unreachable"
    with pytest.raises(UnavailableError, match="the hive has ended"):
        async with open_events(client, "GET", "/x", what="the hive"):
            pass


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 X\r\n", http(b"{", length=50)])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_connection_that_breaks_is_the_peers_fault(answer: bytes, reset: bool) -> None:
    async with peer(answer, reset=reset) as (url, _):
        with pytest.raises(PeerError, match=r"the hive broke the connection: \w"):
            await get(url)


async def test_an_answer_that_is_not_http_is_the_peers_fault() -> None:
    async with peer(b"SSH-2.0-OpenSSH_9.2\r\n") as (url, _):
        with pytest.raises(PeerError, match="the hive broke the connection"):
            await get(url)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"role": "user"}'])
async def test_an_answer_of_the_wrong_shape_is_the_peers_fault(body: bytes) -> None:
    async with peer(http(body)) as (url, _):
        with pytest.raises(PeerError, match="the hive gave a wrong answer"):
            await get(url)


async def test_a_refusal_of_ours_arrives_as_it_was_raised() -> None:
    sent = InsufficientError("no memory", hint="smaller", code="no_gpu_memory", required=5)
    body = error_response(sent).body
    async with peer(http(body, 507)) as (url, _):
        with pytest.raises(InsufficientError, match="no memory") as info:
            await get(url)
    got = info.value
    assert (got.code, got.hint, got.details) == ("no_gpu_memory", "smaller", {"required": 5})


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (404, b"not here", NotFoundError, "404: not here"),
        (409, b'{"error": "text"}', ConflictError, '409: {"error": "text"}'),
        (404, b'{"error": {"message": "no model", "type": "x"}}', NotFoundError, "no model"),
        (500, b'{"detail": []}', RbeeError, '500: {"detail": []}'),
        (418, b"\xff" * 400, RbeeError, "418: "),
        (409, b'{"error": {"message": "m", "details": 5}}', ConflictError, "409: "),
    ],
)
def test_a_foreign_refusal_keeps_its_status_and_text(
    status: int, body: bytes, kind: type[RbeeError], message: str
) -> None:
    error = error_of(httpx.Response(status, content=body))
    assert type(error) is kind
    assert error.message.startswith(message)
    assert len(error.message) < 250


def test_details_named_like_arguments_do_no_harm() -> None:
    body = b'{"error": {"code": "x", "message": "m", "details": {"hint": 1, "message": 2}}}'
    error = error_of(httpx.Response(409, content=body))
    assert (error.code, error.details) == ("x", {"hint": 1, "message": 2})


async def test_the_environment_names_no_proxy_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    async with peer(http(b'{"role": "", "content": ""}')) as (url, _):
        await get(url)


# streams of events ----------------------------------------------------------------------------
HEAD = b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\n\r\n"
EVENTS = b"event: token\ndata: 1\n\nevent: token\ndata: 2\n\n"


async def collect(url: str) -> list[tuple[str, str]]:
    async with open_client(url) as client, open_events(client, "GET", "/x", what="w") as events:
        return [event async for event in events]


async def test_events_come_to_the_end_of_the_stream() -> None:
    async with peer(HEAD + EVENTS) as (url, heard):
        assert await collect(url) == [("token", "1"), ("token", "2")]
    assert b"accept: text/event-stream" in heard[0].lower()


async def test_a_stream_that_is_cut_is_the_peers_fault_after_what_came() -> None:
    chunked = HEAD.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n")
    async with (
        peer(chunked + b"%x\r\n%s\r\n" % (len(EVENTS), EVENTS)) as (url, _),
        open_client(url) as client,
        open_events(client, "GET", "/x", what="w") as events,
    ):
        assert [await anext(events), await anext(events)] == [("token", "1"), ("token", "2")]
        with pytest.raises(PeerError, match="w broke the connection"):
            await anext(events)


async def test_a_stream_that_is_refused_raises_the_refusal() -> None:
    body = error_response(ConflictError("busy")).body
    async with peer(http(body, 409)) as (url, _):
        with pytest.raises(ConflictError, match="busy"):
            await collect(url)


@pytest.mark.filterwarnings("error:Async generator")
async def test_a_stream_may_be_left_early_and_when_cancelled() -> None:
    async with peer(HEAD + EVENTS) as (url, _), open_client(url) as client:
        async with open_events(client, "GET", "/x", what="w") as events:
            assert await anext(events) == ("token", "1")
        with trio.CancelScope() as scope:
            async with open_events(client, "GET", "/x", what="w") as events:
                await anext(events)
                scope.cancel()
                await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
