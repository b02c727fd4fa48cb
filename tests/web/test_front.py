"""The front door on a real port: what it serves itself, what it hands over, and whom it refuses."""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import h2.connection
import h2.events
import httpx
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.errors import NotFoundError, PeerError, QueueFullError
from rbee.web.exchange import Address
from rbee.web.front import Front
from rbee.web.head import MAX_HEAD
from rbee.web.listener import open_listener
from rbee.web.out import Out, headers_of
from rbee.web.poller import open_poller
from rbee.web.pump import open_pump
from rbee.web.router import MAX_BODY, App, Emit, Passing, Request, Response, Stream, json_response
from rbee.web.server import serve_http
from rbee.web.upstream import Upstreams, open_upstreams

TOKEN = "secret"
AUTH = b"Host: localhost\r\nAuthorization: Bearer secret\r\n"
HEAD = b"HTTP/1.1 200 OK\r\n"
EVENTS = HEAD + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
SHORT = HEAD + b"content-type: application/json\r\nx-worker: w\r\ncontent-length: 3\r\n\r\nabc"

Serve = Callable[[trio.SocketStream], Awaitable[None]]


async def refuse_all(stream: trio.SocketStream) -> None:
    await stream.aclose()


@attrs.define(eq=False)
class Server:
    """A server with a front door, and a worker behind its route /pass."""

    port: int
    scope: trio.CancelScope
    front: Front
    upstreams: Upstreams
    cancelled: list[str] = attrs.field(factory=list)
    ended: trio.Event = attrs.field(factory=trio.Event)

    async def connect(self, data: bytes = b"", buffer: int = 0) -> trio.SocketStream:
        sock = trio.socket.socket()
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        await sock.connect(("127.0.0.1", self.port))
        stream = trio.SocketStream(sock)
        await stream.send_all(data)
        return stream

    async def ask(self, *parts: bytes) -> bytes:
        """Send what may be one request or more and read until the connection is closed."""
        with trio.fail_after(5):
            async with await self.connect() as stream:
                for part in parts:
                    await stream.send_all(part)
                    await wait_all_tasks_blocked(0.01)
                return await read_all(stream)


async def read_all(stream: trio.SocketStream) -> bytes:
    data = b""
    while part := await stream.receive_some():
        data += part
    return data


async def read_until(stream: trio.SocketStream, end: bytes) -> bytes:
    data = b""
    with trio.fail_after(5):
        while not data.endswith(end):
            part = await stream.receive_some()
            assert part, data
            data += part
    return data


def make_app(server: Callable[[], Server], worker: Address) -> App:
    app = App(token=TOKEN)

    async def hello(request: Request) -> Response:
        return json_response({"hello": True})

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    async def count(request: Request) -> Stream:
        total = int(await request.body())

        async def run(emit: Emit) -> None:
            try:
                for number in range(total):
                    await emit(b"data: %d\n\n" % number)
                    await trio.sleep(0.01)
            except trio.Cancelled:
                server().cancelled.append("count")
                raise

        return Stream(run)

    async def pass_on(request: Request) -> Passing:
        body = await request.body()

        async def run(out: Out) -> None:
            headers = ((b"host", b"worker"),)
            try:
                async with server().upstreams.ask(
                    worker, "POST", b"/pass", headers, body, "the worker"
                ) as answer:
                    await out.pass_on(answer, headers_of(answer), silence=5)
            except PeerError as error:
                if not out.begun:
                    raise
                await out.end_with(b"event: error\ndata: %b\n\n" % error.code.encode())
            except trio.Cancelled:
                server().cancelled.append("pass")
                raise

        return Passing(run)

    async def fail(request: Request) -> Response:
        raise NotFoundError("nothing there")

    async def refuse(request: Request) -> Response:
        raise QueueFullError("come again")

    app.add("GET", "/hello", hello)
    app.add("POST", "/full", refuse, is_data=True)
    app.add("POST", "/echo", echo, is_data=True)
    app.add("POST", "/count", count, is_data=True)
    app.add("POST", "/pass", pass_on, is_data=True)
    app.add("POST", "/fail", fail, is_data=True)
    return app


@asynccontextmanager
async def serving(
    worker: Serve = refuse_all, *, grace: float = 0.3, stall_limit: float = 30.0
) -> AsyncGenerator[Server, None]:
    listener = open_listener("127.0.0.1", 0, exact=True)
    port = listener.getsockname()[1]

    async def serve(server: Server, app: App, *, task_status: trio.TaskStatus[str]) -> None:
        with server.scope:
            await serve_http(
                app, listener, grace=grace, front=server.front, task_status=task_status
            )
        server.ended.set()

    async with trio.open_nursery() as nursery:
        listen = partial(trio.serve_tcp, worker, 0, host="127.0.0.1")
        (behind,) = await nursery.start(listen)
        address = Address.parse(f"http://127.0.0.1:{behind.socket.getsockname()[1]}")
        async with (
            open_poller() as poller,
            open_pump(poller, stall_limit) as pump,
            open_upstreams(poller) as upstreams,
            trio.open_nursery() as serving,
        ):
            app = make_app(lambda: server, address)
            server = Server(port, trio.CancelScope(), Front(app, pump), upstreams)
            await serving.start(serve, server, app)
            yield server
            server.scope.cancel()
        assert len(poller) == 0
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def opened(server: Server, by: str) -> AsyncGenerator[trio.SocketStream, None]:
    """Open a connection on which the next request is served by the front or by hypercorn."""
    async with await server.connect() as stream:
        if by == "hypercorn":
            await stream.send_all(b"GET /hello HTTP/1.1\r\n" + AUTH + b"\r\n")
            await read_until(stream, b"}")
        yield stream


def post(path: bytes, body: bytes = b"", more: bytes = b"") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return b"POST " + path + b" HTTP/1.1\r\n" + AUTH + more + length + b"\r\n" + body


CLOSE = b"Connection: close\r\n"


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ")[1])


def code_of(answer: bytes) -> str:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]


# what it serves -------------------------------------------------------------------------------
async def test_a_data_route_is_served_and_the_connection_kept() -> None:
    async with serving() as server:
        answer = await server.ask(post(b"/echo", b"one"), post(b"/echo", b"two", CLOSE))
        assert answer.count(HEAD) == 2
        first, _, second = answer.partition(b"one")
        assert b"connection: close" not in first
        assert b"\r\ndate: " in first
        assert second.endswith(b"\r\n\r\ntwo")
        assert b"connection: close" in second


async def test_who_is_refused_on_the_head_may_ask_again_if_his_body_has_come() -> None:
    async with serving() as server:
        refused = post(b"/full", b"body")
        answer = await server.ask(refused, refused, refused[:-1])
        assert answer.count(b" 429 ") == 3
        assert answer.count(b"connection: close") == 1


async def test_a_client_of_the_shelf_is_served_on_all_routes_by_one_connection() -> None:
    async with serving() as server:
        url = f"http://127.0.0.1:{server.port}"
        headers = {"authorization": f"Bearer {TOKEN}"}
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits) as client:
            for _ in range(2):  # once served by the front, then by what it hands over to
                assert (await client.post("/echo", content=b"abc")).content == b"abc"
                answer = await client.post("/count", content=b"2")
                assert answer.content == b"data: 0\n\ndata: 1\n\n"
                assert answer.headers["content-type"] == "text/event-stream"
                assert (await client.post("/fail")).status_code == 404
                assert (await client.get("/hello")).json() == {"hello": True}


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /hello HTTP/1.1\r\n" + AUTH + CLOSE + b"\r\n",
        b"GET /hello HTTP/1.0\r\n" + AUTH + b"\r\n",
        b"\r\n\r\nGET /hello?a=b HTTP/1.1\r\n" + AUTH + CLOSE + b"\r\n",
        post(b"/%65cho", b'{"hello":true}', CLOSE),
    ],
)
async def test_everything_else_is_handed_over(request_: bytes) -> None:
    async with serving() as server:
        answer = await server.ask(request_)
        assert status_of(answer) == 200
        assert b'"hello":' in answer.replace(b" ", b"")


async def test_a_head_and_a_body_may_come_in_any_pieces() -> None:
    request = post(b"/echo", b"abc", CLOSE)
    chunked = b"POST /echo HTTP/1.1\r\n" + AUTH + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n"
    chunked += b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"
    async with serving() as server:
        for data in (request, chunked):
            for size in (7, 31):
                parts = [data[at : at + size] for at in range(0, len(data), size)]
                assert (await server.ask(*parts)).endswith(b"abc")


async def test_a_client_that_waits_for_word_before_its_body_gets_it() -> None:
    async with serving() as server, await server.connect() as stream:
        whole = post(b"/echo", b"abc", b"Expect: 100-continue\r\n")
        await stream.send_all(whole[:-3])
        assert await read_until(stream, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await stream.send_all(b"abc")
        assert status_of(await read_until(stream, b"abc")) == 200


# whom it refuses ------------------------------------------------------------------------------
LINE = b"POST /echo HTTP/1.1\r\n" + AUTH


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (LINE + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc", 400),
        (LINE + b"A: b\r\n c: d\r\nContent-Length: 0\r\n\r\n", 400),
        (LINE + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400),
        (LINE + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (LINE + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", 400),
        (LINE.replace(b"\r\n", b"\n") + b"\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (LINE + b"A: " + b"a" * MAX_HEAD, 431),
        (LINE + b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1), 413),
        (post(b"/echo", b"abc") + post(b"/echo", b"def"), 400),
        (b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc", 401),
        (b"POST /echo HTTP/1.1\r\nHost: evil\r\nContent-Length: 3\r\n\r\nabc", 403),
        (post(b"/echo", b"abc", b"Origin: http://evil\r\n"), 403),
        (post(b"/echo", b"abc", b"Authorization: Bearer x\r\n"), 400),
    ],
    ids=lambda value: repr(value)[-40:],
)  # fmt: skip
async def test_a_hostile_request_is_refused_and_the_connection_closed(
    request_: bytes, status: int
) -> None:
    async with serving() as server:
        answer = await server.ask(request_)
        assert status_of(answer) == status
        assert answer.count(b"HTTP/1.1") == 1
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["message"]
        assert b"\r\nx-request-id: " + error["correlation_id"].encode() + b"\r\n" in answer


@pytest.mark.parametrize("sent", [b"P", LINE, post(b"/echo", b"abc")[:-1]], ids=range(3))
async def test_who_sends_too_slowly_is_refused(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rbee.web.connection.HEAD", 0.1)
    monkeypatch.setattr("rbee.web.patience.SILENCE", 0.1)
    async with serving() as server:
        answer = await server.ask(sent)
        assert status_of(answer) == 408
        assert code_of(answer) == "too_slow"


async def drip(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        while True:
            await stream.send_all(b"x")
            await trio.sleep(0.02)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("by", ["front", "hypercorn"])
async def test_who_sends_byte_by_byte_is_refused_in_the_end_and_cut_off(
    by: str, version: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rbee.web.patience.BASE", 0.3)
    async with serving() as server, opened(server, by) as stream, trio.open_nursery() as nursery:
        endless = b"POST /echo HTTP/" + version + b"\r\n" + AUTH + b"Content-Length: 9999\r\n\r\n"
        await stream.send_all(endless)
        nursery.start_soon(drip, stream)
        with trio.fail_after(3):
            answer = await read_all(stream)
        assert (status_of(answer), code_of(answer)) == (408, "too_slow")
        nursery.cancel_scope.cancel()


async def test_who_sends_byte_by_byte_in_http_2_is_refused_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rbee.web.patience.BASE", 0.3)
    client = h2.connection.H2Connection()
    client.initiate_connection()
    asked = [(":method", "POST"), (":scheme", "http"), (":path", "/echo"),
             (":authority", "localhost"), ("authorization", f"Bearer {TOKEN}")]  # fmt: skip
    client.send_headers(1, asked)
    answer: dict[bytes, bytes] = {}
    async with serving() as server, await server.connect(client.data_to_send()) as stream:
        with trio.fail_after(3):
            while not answer:
                for event in client.receive_data(await stream.receive_some()):
                    if isinstance(event, h2.events.ResponseReceived):
                        answer = dict(event.headers)
                client.send_data(1, b"x")
                await stream.send_all(client.data_to_send())
    assert answer[b":status"] == b"408"


async def test_who_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbee.web.front.KEEP_ALIVE", 0.1)
    async with serving() as server:
        assert await server.ask() == b""
        assert (await server.ask(post(b"/echo", b"abc"))).endswith(b"abc")


async def test_a_refusal_is_read_though_the_client_is_still_sending() -> None:
    big = b"x" * (4 << 20)
    async with serving() as server, await server.connect() as stream:
        await stream.send_all(b"POST /echo HTTP/1.1\r\nHost: localhost\r\n")
        await stream.send_all(b"Content-Length: %d\r\n\r\n" % len(big))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, big)
            with trio.fail_after(5):
                assert status_of(await stream.receive_some()) == 401


# passing on -----------------------------------------------------------------------------------
async def answer_with(*parts: bytes, stream: trio.SocketStream) -> None:
    """Be a worker that sends parts, then ends the connection."""
    async with stream:
        assert await stream.receive_some()
        for part in parts:
            await stream.send_all(part)
            await wait_all_tasks_blocked(0.01)


def worker(*parts: bytes) -> Serve:
    async def serve(stream: trio.SocketStream) -> None:
        await answer_with(*parts, stream=stream)

    return serve


@pytest.mark.parametrize("by", ["front", "hypercorn"])
@pytest.mark.parametrize(
    ("parts", "body"),
    [
        ([SHORT], b"abc"),
        ([SHORT[:-2], b"bc"], b"abc"),
        ([EVENTS + b"9\r\ndata: a\n\n\r\n", b"9\r\ndata: b\n\n\r\n0\r\n\r\n"],
         b"9\r\ndata: a\n\n\r\n9\r\ndata: b\n\n\r\n0\r\n\r\n"),
        ([EVENTS, b"9\r\ndata: a\n\n\r\n", b"5\r\ndata:\r\n", b"4\r\n b\n\n\r\n0\r\n\r\n"],
         b"9\r\ndata: a\n\n\r\n9\r\ndata: b\n\n\r\n0\r\n\r\n"),
        ([HEAD + b"\r\nab", b"c"], b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"),
    ],
)  # fmt: skip
async def test_an_answer_is_passed_on_byte_for_byte(
    parts: list[bytes], body: bytes, by: str
) -> None:
    """By the front, and by what it hands over to."""
    async with serving(worker(*parts)) as server, opened(server, by) as stream:
        await stream.send_all(post(b"/pass", b"{}"))
        answer = await read_until(stream, body)
        assert answer.endswith(b"\r\n\r\n" + body)


async def test_headers_of_the_worker_are_passed_on() -> None:
    async with serving(worker(SHORT)) as server:
        answer = await server.ask(post(b"/pass", b"{}", CLOSE))
        assert b"x-worker: w\r\n" in answer
        assert answer.count(b"content-length") == 1


@pytest.mark.parametrize("by", ["front", "hypercorn"])
@pytest.mark.parametrize(
    "parts",
    [
        [EVENTS, b"9\r\ndata: a\n\n\r\n"],
        [EVENTS + b"9\r\ndata: a\n\n\r\n", b"6\r\ndata: \r\n3\r\nb"],
    ],
)
async def test_a_worker_that_dies_in_the_middle_is_told_by_one_event(
    parts: list[bytes], by: str
) -> None:
    async with serving(worker(*parts)) as server, opened(server, by) as stream:
        await stream.send_all(post(b"/pass", b"{}"))
        answer = await read_until(stream, b"0\r\n\r\n")
        assert answer.count(b"data: a\n\n") == 1
        assert b"data: b" not in answer
        assert answer.endswith(b"event: error\ndata: stream_broken\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("by", ["front", "hypercorn"])
async def test_a_worker_that_falls_silent_in_a_short_body_is_a_refusal(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rbee.web.out.SILENCE", 0.1)
    async with serving(Holding(SHORT[:-1])) as server, opened(server, by) as stream:
        await stream.send_all(post(b"/pass", b"{}", CLOSE))
        with trio.fail_after(3):
            answer = await read_all(stream)
        assert (status_of(answer), code_of(answer)) == (502, "stalled")


async def test_a_worker_that_dies_in_a_long_body_is_seen_as_a_cut() -> None:
    long = HEAD + b"content-length: 100000\r\n\r\nabc"
    async with serving(worker(long)) as server:
        answer = await server.ask(post(b"/pass", b"{}"))
        assert status_of(answer) == 200
        assert answer.endswith(b"\r\n\r\nabc")


@pytest.mark.parametrize("parts", [[], [b"HTTP"], [SHORT[:-1]], [b"nonsense\r\n\r\n"]])
async def test_a_worker_that_dies_before_is_a_refusal(parts: list[bytes]) -> None:
    async with serving(worker(*parts)) as server:
        assert status_of(await server.ask(post(b"/pass", b"{}", CLOSE))) == 502


@attrs.define(eq=False)
class Holding:
    """A worker that has sent something, and waits for the end of its connection."""

    sent: bytes
    began: trio.Event = attrs.field(factory=trio.Event)
    gone: trio.Event = attrs.field(factory=trio.Event)

    async def __call__(self, stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            if self.sent:
                await stream.send_all(self.sent)
            self.began.set()
            with suppress(trio.BrokenResourceError):
                await stream.receive_some()
            self.gone.set()


@pytest.mark.parametrize("by", ["front", "hypercorn"])
@pytest.mark.parametrize(
    "sent", [b"", EVENTS, EVENTS + b"9\r\ndata: a\n\n\r\n", SHORT[:-1]],
    ids=["prefill", "head", "stream", "whole"],
)  # fmt: skip
async def test_a_client_that_leaves_frees_the_worker_at_once(sent: bytes, by: str) -> None:
    holding = Holding(sent)
    async with serving(holding) as server, opened(server, by) as stream:
        await stream.send_all(post(b"/pass", b"{}"))
        with trio.fail_after(5):
            await holding.began.wait()
            await wait_all_tasks_blocked(0.01)
            await stream.aclose()
        with trio.fail_after(0.3):
            await holding.gone.wait()
        assert server.cancelled == ["pass"]


async def test_a_thousand_clients_that_vanish_at_once_free_the_worker_and_leave_nothing() -> None:
    """Twice: what the first thousand took is there for the second."""
    crowd = Crowd()
    async with serving(crowd.serve) as server:
        await crowd.come_and_vanish(server)
        before = crowd.held()
        await crowd.come_and_vanish(server)
        descriptors, memory = (now - then for now, then in zip(crowd.held(), before, strict=True))
        assert descriptors == 0
        assert memory < 4 << 20
        ended = server.front.app.requests._ended
        assert ended == {("/pass", "200", "client_gone"): 2 * crowd.size}
        assert (await server.ask(post(b"/echo", b"abc", CLOSE))).endswith(b"abc")


class Crowd:
    """As many clients, up to a thousand, as descriptors allow here: each takes five."""

    def __init__(self) -> None:
        most = (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100) // 5
        self.size = min(1000, most)
        self.here = 0
        self.changed = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Be the worker of one."""
        async with stream:
            await stream.receive_some()
            await stream.send_all(EVENTS + b"9\r\ndata: a\n\n\r\n")
            self.note(1)
            with suppress(trio.BrokenResourceError):
                await stream.receive_some()
            self.note(-1)

    def note(self, change: int) -> None:
        self.here += change
        self.changed.set()
        self.changed = trio.Event()

    async def come_and_vanish(self, server: Server) -> None:
        streams = [await server.connect(post(b"/pass", b"{}")) for _ in range(self.size)]
        for stream in streams:
            await read_until(stream, b"data: a\n\n\r\n")
        assert self.here == self.size
        for stream in streams:
            stream.socket.close()
        with trio.fail_after(5):
            while self.here or server.front.app.requests._running["/pass"]:
                await self.changed.wait() if self.here else await trio.sleep(0.01)

    def held(self) -> tuple[int, int]:
        """Return our descriptors, and our memory in bytes."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), pages * resource.getpagesize()


async def flood(stream: trio.SocketStream) -> None:
    """Be a worker that sends without end, to whoever does not read."""
    with suppress(trio.BrokenResourceError):
        await stream.receive_some()
        await stream.send_all(HEAD + b"\r\n")
        while True:
            await stream.send_all(b"x" * 65536)


async def test_a_client_that_does_not_read_is_dropped_and_delays_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gone = trio.Event()

    async def flood_until_gone(stream: trio.SocketStream) -> None:
        await flood(stream)
        gone.set()

    async with serving(flood_until_gone, stall_limit=0.5) as server:
        stalled = await server.connect(post(b"/pass", b"{}"), buffer=4096)
        await trio.sleep(0.2)
        assert not gone.is_set()
        with trio.fail_after(0.2):
            assert (await server.ask(post(b"/echo", b"abc", CLOSE))).endswith(b"abc")
        with trio.fail_after(2):
            await gone.wait()
        await stalled.aclose()


async def test_a_stream_of_ours_ends_with_its_client() -> None:
    async with serving() as server:
        stream = await server.connect(post(b"/count", b"100000"))
        await read_until(stream, b"data: 1\n\n\r\n")
        await stream.aclose()
        await wait_all_tasks_blocked(0.05)
        assert server.cancelled == ["count"]


# its end --------------------------------------------------------------------------------------
async def test_the_end_closes_idle_connections_and_bounds_the_others() -> None:
    holding = Holding(EVENTS + b"9\r\ndata: a\n\n\r\n")
    async with serving(holding, grace=0.3) as server:
        idle = await server.connect(post(b"/echo", b"abc"))
        await read_until(idle, b"abc")
        fresh = await server.connect()
        streaming = await server.connect(post(b"/pass", b"{}"))
        await read_until(streaming, b"data: a\n\n\r\n")
        began = trio.current_time()
        server.scope.cancel()
        with trio.fail_after(0.2):
            assert await read_all(idle) == b""
            assert await read_all(fresh) == b""
        with trio.fail_after(2):
            await server.ended.wait()
        assert trio.current_time() - began == pytest.approx(0.3, abs=0.25)
        for stream in (idle, fresh, streaming):
            await stream.aclose()


async def test_clients_that_do_not_read_do_not_hold_up_the_end() -> None:
    async with serving(flood, grace=0.3) as server:
        stalled = [await server.connect(post(b"/pass", b"{}"), buffer=4096) for _ in range(20)]
        relays = server.front.pump._relays
        with trio.fail_after(2):
            while sum(bool(one.pending) for one in relays) < 20:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        began = trio.current_time()
        server.scope.cancel()
        with trio.fail_after(2):
            await server.ended.wait()
        assert trio.current_time() - began == pytest.approx(0.3, abs=0.25)
        for stream in stalled:
            await stream.aclose()


async def test_a_bug_ends_one_connection_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    async with serving() as server:
        respond = server.front.app.respond
        monkeypatch.setattr(server.front.app, "respond", fail)
        assert await server.ask(post(b"/echo", b"abc")) == b""
        assert "dropped a connection: RuntimeError" in caplog.text
        monkeypatch.setattr(server.front.app, "respond", respond)
        assert (await server.ask(post(b"/echo", b"abc", CLOSE))).endswith(b"abc")
