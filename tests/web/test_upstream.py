"""Connections to workers: used again, never one that is over, and closed by whoever gives up."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.errors import PeerError, UnavailableError
from rbee.web import upstream
from rbee.web.exchange import Address
from rbee.web.head import MAX_HEAD
from rbee.web.poller import open_poller
from rbee.web.upstream import Answer, Upstreams, open_upstreams

HEAD = b"HTTP/1.1 200 OK\r\n"
SHORT = HEAD + b"Content-Length: 3\r\n\r\nabc"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@attrs.define(eq=False)
class Peer:
    """A worker that answers every request on a connection with the next of its answers.

    ``hangs_up``: after so many answers on one connection.
    """

    answers: list[bytes]
    hangs_up: int = 1000
    connections: int = 0
    open: int = 0
    requests: list[bytes] = attrs.field(factory=list)
    changed: trio.Event = attrs.field(factory=trio.Event)

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        self._count(1)
        async with stream:
            for number in range(self.hangs_up + 1):
                try:
                    data = await stream.receive_some()
                except trio.BrokenResourceError:
                    break
                if not data or number == self.hangs_up:
                    break
                self.requests.append(bytes(data))
                await stream.send_all(self.answers.pop(0) if self.answers else SHORT)
        self._count(-1)

    def _count(self, change: int) -> None:
        self.open += change
        self.changed.set()
        self.changed = trio.Event()

    async def wait_open(self, count: int) -> None:
        with trio.fail_after(5):
            while self.open != count:
                await self.changed.wait()


Serve = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def serving(peer: Peer | Serve) -> AsyncGenerator[tuple[Upstreams, Address], None]:
    serve = peer.serve if isinstance(peer, Peer) else peer
    async with trio.open_nursery() as nursery:
        listen = partial(trio.serve_tcp, serve, 0, host="127.0.0.1")
        (listener,) = await nursery.start(listen)
        port = listener.socket.getsockname()[1]
        async with open_poller() as poller, open_upstreams(poller) as upstreams:
            yield upstreams, Address.parse(f"http://127.0.0.1:{port}")
        assert len(poller) == 0
        nursery.cancel_scope.cancel()


async def read(answer: Answer) -> bytes:
    parts = []
    while part := await answer.chunk():
        parts.append(part)
    return b"".join(parts)


async def ask(upstreams: Upstreams, address: Address, body: bytes = b"{}") -> bytes:
    with trio.fail_after(5):
        headers = ((b"host", b"h"),)
        async with upstreams.ask(address, "POST", b"/x", headers, body, "the worker") as answer:
            return await read(answer)


@pytest.mark.parametrize(
    "answer",
    [
        SHORT,
        CHUNKED + b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + SHORT,
    ],
)
async def test_a_connection_is_used_again_for_the_next_request(answer: bytes) -> None:
    peer = Peer([answer, answer, answer])
    async with serving(peer) as (upstreams, address):
        for _ in range(3):
            assert await ask(upstreams, address) == b"abc"
        assert peer.connections == 1
        assert peer.requests[0] == b"POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\n{}"


async def test_the_last_one_given_back_is_taken_first() -> None:
    peer = Peer([])
    async with serving(peer) as (upstreams, address):
        headers = ((b"host", b"h"),)
        open_request = partial(upstreams.ask, address, "POST", b"/x", headers, b"", "the worker")
        async with open_request() as one:
            async with open_request() as two:
                last = two.fileno()
                await read(two)
            await read(one)
            async with open_request() as three:
                assert three.fileno() == last
        assert peer.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + b"Connection: close\r\nContent-Length: 3\r\n\r\nabc",
        SHORT + b"more than was asked for",
        b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    ],
)
async def test_a_connection_that_cannot_be_used_again_is_closed(answer: bytes) -> None:
    peer = Peer([answer])
    async with serving(peer) as (upstreams, address):
        assert await ask(upstreams, address) == b"abc"
        await peer.wait_open(0)
        assert await ask(upstreams, address) == b"abc"
        assert peer.connections == 2


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(HEAD + b"\r\nabc")

    async with serving(serve) as (upstreams, address):
        assert await ask(upstreams, address) == b"abc"
        assert not upstreams._idle


async def test_the_end_of_an_idle_connection_is_seen_at_once() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(SHORT)
        ended.set()

    ended = trio.Event()
    async with serving(serve) as (upstreams, address):
        await ask(upstreams, address)
        await ended.wait()
        await wait_all_tasks_blocked()
        assert not upstreams._idle


async def test_a_request_on_a_connection_that_ends_under_it_is_sent_again() -> None:
    peer = Peer([], hangs_up=1)  # it takes a second request and says nothing
    async with serving(peer) as (upstreams, address):
        assert await ask(upstreams, address) == b"abc"
        assert await ask(upstreams, address, b"second") == b"abc"
        assert peer.connections == 2
        assert peer.requests[-1].endswith(b"second")


@pytest.mark.parametrize("begun", [b"", b"H", HEAD])
async def test_a_request_is_never_sent_twice_where_it_may_have_run(begun: bytes) -> None:
    """On a new connection, or behind the first byte of an answer, an end is an error."""
    connections = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        async with stream:
            await stream.receive_some()
            if begun:
                await stream.send_all(SHORT)
                await stream.receive_some()
            await stream.send_all(begun)

    async with serving(serve) as (upstreams, address):
        if begun:
            await ask(upstreams, address)
        with pytest.raises(PeerError, match="the worker closed the connection before it answered"):
            await ask(upstreams, address)
        assert connections == 1


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP answer"),
        (HEAD + b"A: " + b"a" * MAX_HEAD, "more than 32768 bytes"),
        (HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", "no HTTP answer"),
        (CHUNKED + b"nonsense\r\n", "no size of a chunk"),
        (CHUNKED + b"3\r\na", "in the middle of the answer"),
        (HEAD + b"Content-Length: 9\r\n\r\nabc", "in the middle of the answer"),
    ],
)
async def test_a_bad_answer_is_an_error_of_the_peer(answer: bytes, told: str) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(answer)

    async with serving(serve) as (upstreams, address):
        with pytest.raises(PeerError, match=told):
            await ask(upstreams, address)
        assert not upstreams._idle


async def test_a_refusal_that_comes_before_the_body_is_read_is_told() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nabc")
        await stream.send_eof()
        while await stream.receive_some():
            pass

    async with serving(serve) as (upstreams, address):
        assert await ask(upstreams, address, b"x" * 5_000_000) == b"abc"


async def test_nobody_there_is_told_as_such() -> None:
    async with serving(Peer([])) as (upstreams, _):
        with pytest.raises(UnavailableError, match="the worker does not answer") as info:
            await ask(upstreams, Address.parse("http://127.0.0.1:1"))
        assert info.value.code == "unreachable"


@pytest.mark.parametrize("begun", [b"", CHUNKED + b"1\r\na\r\n"], ids=["head", "body"])
async def test_cancelling_closes_the_connection(begun: bytes) -> None:
    gone = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(begun)
            assert not await stream.receive_some()
            gone.set()

    async with serving(serve) as (upstreams, address):
        with trio.move_on_after(0.1):
            await ask(upstreams, address)
        with trio.fail_after(5):
            await gone.wait()
        assert not upstreams._idle


async def test_many_that_are_cancelled_at_once_leave_nothing_behind() -> None:
    """What wedges httpx's pool: many that end while many wait."""
    peer = Peer([])
    async with serving(peer) as (upstreams, address):

        async def ask_briefly(seconds: float) -> None:
            with trio.move_on_after(seconds):
                await ask(upstreams, address)

        for _ in range(5):
            async with trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(ask_briefly, number / 4000)
        assert await ask(upstreams, address) == b"abc"
        idle = sum(map(len, upstreams._idle.values()))
        await peer.wait_open(idle)


async def test_connections_that_waited_long_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer([])
    async with serving(peer) as (upstreams, address):
        await ask(upstreams, address)
        monkeypatch.setattr(upstream, "IDLE", -1.0)
        await ask(upstreams, address)
        assert peer.connections == 2
