"""The server on a real port: its streams and its bounded end."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import h2.config
import h2.connection
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.web.client import call, open_client
from rbee.web.listener import open_listener
from rbee.web.router import App, Emit, Request, Response, Stream, json_response
from rbee.web.server import serve_http

GRACE = 0.3
TOKEN = "secret"


# serving --------------------------------------------------------------------------------------
async def pid(request: Request) -> Response:
    return json_response({"pid": os.getpid()})


def make(**routes: Callable[[Request], Awaitable[Response | Stream]]) -> App:
    app = App(token=TOKEN)
    app.add("GET", "/pid", pid)
    for name, handler in routes.items():
        app.add("GET", f"/{name}", handler)
    return app


@asynccontextmanager
async def serving(
    app: App, host: str = "127.0.0.1", grace: float = GRACE
) -> AsyncGenerator[tuple[trio.CancelScope, trio.Event, int], None]:
    """Give the scope that encloses a server, the event of its end and its port."""
    listener = open_listener(host, 0, exact=True)
    port = listener.getsockname()[1]
    scope, ended = trio.CancelScope(), trio.Event()

    async def serve(*, task_status: trio.TaskStatus[str]) -> None:
        with scope:
            await serve_http(app, listener, grace=grace, task_status=task_status)
        ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        yield scope, ended, port
        scope.cancel()


async def open_request(port: int, path: str) -> trio.SocketStream:
    """Send a request on a connection with a small receive buffer; nothing is read."""
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await sock.connect(("127.0.0.1", port))
    stream = trio.SocketStream(sock)
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    await stream.send_all(head.encode())
    return stream


async def endless(request: Request) -> Stream:
    async def run(emit: Emit) -> None:
        while True:
            await emit(b"x" * 65536)

    return Stream(run)


async def test_a_server_answers_on_its_port() -> None:
    async with (
        serving(make()) as (_, _, port),
        open_client(f"http://127.0.0.1:{port}", TOKEN) as client,
    ):
        assert await call(client, "GET", "/pid", dict, what="server") == {"pid": os.getpid()}


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_a_reader_who_stopped_does_not_hold_up_the_end(host: str) -> None:
    """DESIGN 3, trap 6: the server shields its writes without a deadline."""
    async with (
        serving(make(endless=endless), host) as (scope, ended, port),
        await open_request(port, "/endless"),
    ):
        await wait_all_tasks_blocked(0.1)  # all buffers are full
        scope.cancel()
        with trio.fail_after(GRACE + 1):
            await ended.wait()


async def test_the_port_is_free_at_once_when_the_server_ends() -> None:
    async with (
        serving(make(endless=endless), grace=5.0) as (scope, ended, port),
        await open_request(port, "/endless") as stream,
    ):
        await stream.receive_some(1)
        scope.cancel()
        await wait_all_tasks_blocked(0.05)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert not ended.is_set()


async def test_a_running_answer_is_finished_within_the_grace() -> None:
    begun, go_on = trio.Event(), trio.Event()

    async def slow(request: Request) -> Response:
        begun.set()
        await go_on.wait()
        return Response(b"done", content_type=b"text/plain")

    async with (
        serving(make(slow=slow), grace=5.0) as (scope, ended, port),
        await open_request(port, "/slow") as stream,
    ):
        await begun.wait()
        scope.cancel()
        await wait_all_tasks_blocked(0.05)
        go_on.set()
        data = b"".join([chunk async for chunk in stream])
        assert data.endswith(b"done")
        with trio.fail_after(1):
            await ended.wait()


async def test_a_connection_that_was_used_for_a_stream_does_not_hold_up_the_end() -> None:
    """Who watches for the client hears of a disconnect at the answer's own end, too."""

    async def stream(request: Request) -> Stream:
        async def run(emit: Emit) -> None:
            await emit(b"x")

        return Stream(run)

    async with (
        AsyncExitStack() as open_ones,
        serving(make(stream=stream), grace=5.0) as (scope, ended, port),
    ):
        for _ in range(20):  # which of two tasks runs first is left to chance
            connection = await open_request(port, "/stream")
            await open_ones.enter_async_context(connection)
            with trio.fail_after(1):
                while not (await connection.receive_some()).endswith(b"0\r\n\r\n"):
                    pass
        await wait_all_tasks_blocked(0.05)
        scope.cancel()
        with trio.fail_after(1):
            await ended.wait()


@pytest.mark.parametrize("line", ["HTTP/1.0", "HTTP/1.1\r\nConnection: close"])
async def test_a_stream_that_ends_with_its_connection_has_an_end(line: str) -> None:
    async def stream(request: Request) -> Stream:
        async def run(emit: Emit) -> None:
            await emit(b"x")

        return Stream(run)

    rest = f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    async with serving(make(stream=stream)) as (_, _, port):
        for _ in range(10):  # which of two tasks runs first is left to chance
            async with await trio.open_tcp_stream("127.0.0.1", port) as connection:
                await connection.send_all(f"GET /stream {line}\r\n{rest}".encode())
                with trio.fail_after(2):
                    data = b"".join([part async for part in connection])
                assert b"200" in data
                assert b"x" in data.partition(b"\r\n\r\n")[2]


async def test_an_answer_that_outlasts_the_grace_is_cancelled() -> None:
    begun, cancelled = trio.Event(), trio.Event()

    async def stuck(request: Request) -> Response:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with (
        serving(make(stuck=stuck)) as (scope, ended, port),
        await open_request(port, "/stuck"),
    ):
        await begun.wait()
        start = trio.current_time()
        scope.cancel()
        with trio.fail_after(GRACE + 1):
            await ended.wait()
    assert cancelled.is_set()
    assert trio.current_time() - start >= GRACE


async def test_a_stream_is_cancelled_when_its_client_goes_away() -> None:
    begun, cancelled = trio.Event(), trio.Event()

    async def quiet(request: Request) -> Stream:
        async def run(emit: Emit) -> None:
            await emit(b"a")
            begun.set()
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

        return Stream(run)

    async with serving(make(quiet=quiet)) as (_, _, port):
        async with await open_request(port, "/quiet"):
            await begun.wait()
        with trio.fail_after(1):
            await cancelled.wait()
        async with open_client(f"http://127.0.0.1:{port}", TOKEN) as client:
            await call(client, "GET", "/pid", dict, what="server")


async def test_an_idle_connection_does_not_hold_up_the_end() -> None:
    async with (
        serving(make()) as (scope, ended, port),
        await trio.open_tcp_stream("127.0.0.1", port),
    ):
        scope.cancel()
        with trio.fail_after(GRACE + 1):
            await ended.wait()


@pytest.mark.parametrize("path", ["/pid", "/wait"])
async def test_a_connection_ends_with_its_client_not_with_the_keep_alive(path: str) -> None:
    """Also one that is closed while its answer is being made."""
    asked, go = trio.Event(), trio.Event()

    async def wait(request: Request) -> Response:
        asked.set()
        await go.wait()
        return json_response({})

    async with serving(make(wait=wait)) as (_, _, port):
        fds = len(os.listdir("/proc/self/fd"))
        stream = await open_request(port, path)
        if path == "/wait":
            await asked.wait()
        else:
            await stream.receive_some(1)
        await stream.aclose()
        go.set()
        with trio.fail_after(2):
            while len(os.listdir("/proc/self/fd")) > fds:  # noqa: ASYNC110  # it has no event
                await trio.sleep(0.01)


async def test_nothing_of_a_server_stays_open() -> None:
    fds = len(os.listdir("/proc/self/fd"))
    async with serving(make(endless=endless)) as (scope, ended, port):
        stream = await open_request(port, "/endless")
        await stream.receive_some(1)
        scope.cancel()
        await ended.wait()
        await stream.aclose()
    assert len(os.listdir("/proc/self/fd")) == fds


# peers that break the protocol ----------------------------------------------------------------
def http2(*headers: tuple[bytes, bytes]) -> bytes:
    """Return a request as a client sends it that checks nothing; later names replace earlier."""
    config = h2.config.H2Configuration(
        header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
    )
    connection = h2.connection.H2Connection(config)
    connection.initiate_connection()
    good = {b":method": b"GET", b":scheme": b"http", b":path": b"/pid", b":authority": b"localhost"}
    connection.send_headers(
        1, [one for one in {**good, **dict(headers)}.items() if one[1]], end_stream=True
    )
    return connection.data_to_send()


HOST = b"Host: localhost\r\n"
HOSTILE = {
    "a path that is not ASCII": http2((b":path", b"/\xff")),
    "a method that is not ASCII": http2((b":method", b"\xff")),
    "CONNECT in HTTP/2": http2((b":method", b"CONNECT"), (b":path", b""), (b":scheme", b"")),
    "two hosts in HTTP/2": http2((b"host", b"evil.example")),
    "nonsense in HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 99,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 99,
    "no host": b"GET /pid HTTP/1.1\r\n\r\n",
    "no host in HTTP/1.0": b"GET /pid HTTP/1.0\r\n\r\n",
    "two hosts": b"GET /pid HTTP/1.1\r\n" + HOST + b"Host: evil.example\r\n\r\n",
    "a host with a zero": b"GET /pid HTTP/1.1\r\nHost: local\0host\r\n\r\n",
    "a huge header": b"GET /pid HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 200_000 + b"\r\n\r\n",
    "a header without a colon": b"GET /pid HTTP/1.1\r\n" + HOST + b"nonsense\r\n\r\n",
    "a bad chunk": b"POST /pid HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + HOST + b"\r\nzz\r\n",
    "a websocket": b"GET /pid HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + HOST
    + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
}  # fmt: skip


async def test_nothing_that_a_stranger_sends_ends_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each is sent without a token; a running answer goes on through all of them."""
    caplog.set_level(logging.INFO, "rbee.web")
    go_on = trio.Event()

    async def slow(request: Request) -> Response:
        await go_on.wait()
        return Response(b"done", content_type=b"text/plain")

    async with serving(make(slow=slow)) as (_, _, port), await open_request(port, "/slow") as mine:
        for what, data in HOSTILE.items():
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                with suppress(trio.BrokenResourceError):  # it may be thrown out before its end
                    await stream.send_all(data)
                    await stream.send_eof()
                with suppress(trio.BrokenResourceError), trio.fail_after(5):
                    answer = b"".join([chunk async for chunk in stream])
                    assert b" 200 " not in answer, what
        go_on.set()
        with trio.fail_after(5):
            assert b"200" in await mine.receive_some()
    assert "Traceback" not in caplog.text
    assert caplog.text.count("dropped a connection") == 3


@pytest.mark.slow
async def test_a_child_does_not_inherit_the_listener() -> None:
    listing = "import os; print(*os.listdir('/proc/self/fd'))"
    argv = [sys.executable, "-c", listing]
    run = partial(subprocess.run, argv, capture_output=True, text=True, close_fds=False, check=True)
    before = set(run().stdout.split())
    async with serving(make()):
        assert set(run().stdout.split()) == before
