"""What a relay puts out is what came in, whatever the cuts, the partial sends and the ends."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from rbee.errors import PeerError
from rbee.web.body import LAST_CHUNK, Body, Chunked, Counted, UntilClosed, chunk
from rbee.web.events import WholeEvents
from rbee.web.poller import HUNG_UP, IN, open_poller
from rbee.web.pump import Pump, Relay, open_pump

SMALL = 4608  # the least that Linux buffers for a socket
BIG = b"x" * 100_000


@attrs.define(eq=False)
class Ends:
    """A relay with both its far ends, and what became of it."""

    worker: socket.socket
    client: socket.socket
    relay: Relay
    scope: trio.CancelScope
    gone: list[str]
    error: PeerError | None = None
    over: trio.Event = attrs.field(factory=trio.Event)

    async def wait(self) -> None:
        with trio.fail_after(5):
            await self.over.wait()

    async def read(self, size: int = 1 << 16) -> bytes:
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(self.client)
        return self.client.recv(size)

    async def read_all(self) -> bytes:
        """Read until the relay is over and nothing is left."""
        got = b""
        while not self.over.is_set():
            got += self._read_some()
            await trio.lowlevel.checkpoint()
        while data := self._read_some():
            got += data
        return got

    def _read_some(self) -> bytes:
        try:
            return self.client.recv(1 << 16)
        except BlockingIOError:
            return b""


@asynccontextmanager
async def pumping(stall_limit: float = 30.0) -> AsyncGenerator[Pump, None]:
    async with open_poller() as poller, open_pump(poller, stall_limit) as pump:
        yield pump
        assert len(poller) == 0
        assert len(pump) == 0


@asynccontextmanager
async def open_relay(
    body: Body, first: bytes = b"", *, stall_limit: float = 30.0, **options: Any
) -> AsyncGenerator[Ends, None]:
    async with pumping(stall_limit) as pump, relaying(pump, body, first, **options) as ends:
        yield ends


@asynccontextmanager
async def relaying(
    pump: Pump, body: Body, first: bytes = b"", **options: Any
) -> AsyncGenerator[Ends, None]:
    (worker, source), (sink, client) = sockets = [socket.socketpair(), socket.socketpair()]
    for one in itertools.chain(*sockets):
        one.setblocking(False)
    sink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    scope = trio.CancelScope()
    gone: list[str] = []

    def lose(why: str) -> None:
        gone.append(why)
        scope.cancel()

    async def run() -> None:
        with scope:
            try:
                await ends.relay.run(first)
            except PeerError as error:
                ends.error = error
        ends.over.set()

    pump.poller.add(sink.fileno(), HUNG_UP, lambda events: None)
    relay = Relay(pump, source.fileno(), sink.fileno(), body, lose, **options)
    ends = Ends(worker, client, relay, scope, gone)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            yield ends
            nursery.cancel_scope.cancel()
    finally:
        pump.poller.remove(sink.fileno())
        for one in itertools.chain(*sockets):
            one.close()


def unchunked(data: bytes) -> tuple[bytes, bool]:
    body = Chunked()
    return body.feed(data), body.done


PARTS = {"a": b"data: a\n\n", "b": b"data: b\r\n\r\n", "x": b"x", "n": b"\n", "Y": b"y" * 5000,
         "Z": b"z" * 20_000}  # fmt: skip
CUTS = st.lists(st.integers(1, 30_000), min_size=1, max_size=4)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.text(st.sampled_from(sorted(PARTS)), max_size=8),
    CUTS,
    st.booleans(),
    st.booleans(),
    st.integers(0, 6),
)
async def test_output_is_input_whatever_the_cuts(
    names: str, cuts: list[int], holds_back: bool, is_cut: bool, missing: int
) -> None:
    """A reader who comes late makes every send a partial one; the worker may hang up at once."""
    parts = [PARTS[name] for name in names]
    sent = b"".join(map(chunk, parts)) + LAST_CHUNK
    is_whole = not (is_cut and missing)
    sent = sent if is_whole else sent[:-missing]
    events = WholeEvents() if holds_back else None
    async with open_relay(Chunked(PeerError), events=events) as ends:

        async def send() -> None:
            at, sizes = 0, [max(cut, len(sent) // 300) for cut in cuts]
            while at < len(sent):
                sizes.append(sizes.pop(0))
                await trio.lowlevel.wait_writable(ends.worker)
                at += ends.worker.send(sent[at : at + sizes[-1]])
            if is_cut:
                ends.worker.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            with trio.fail_after(5):
                got = await ends.read_all()
        body, is_ended = unchunked(got)
        whole = b"".join(parts)
        assert is_ended == is_whole
        assert (ends.error is None) == is_whole
        if holds_back and not is_whole:
            assert whole.startswith(body)
            assert events is not None
            assert body + events.rest() == whole
        else:
            assert body == whole


@pytest.mark.parametrize("holds_back", [True, False])
async def test_an_event_is_passed_on_as_it_comes(holds_back: bool) -> None:
    async with open_relay(Chunked(), events=WholeEvents() if holds_back else None) as ends:
        for text in (b"data: a\n\n", b"data: b\n\n"):
            ends.worker.send(chunk(text))
            assert await ends.read() == chunk(text)
        ends.worker.send(LAST_CHUNK)
        assert await ends.read() == LAST_CHUNK
        await ends.wait()
    assert ends.error is None


async def test_what_came_with_the_head_is_passed_on_first() -> None:
    body = Chunked()
    first = body.feed(chunk(b"a") + b"3\r\nb")
    async with open_relay(body, first) as ends:
        assert await ends.read() == chunk(b"ab")
        ends.worker.send(b"cd\r\n" + LAST_CHUNK)
        assert await ends.read() == chunk(b"cd") + LAST_CHUNK
        await ends.wait()


async def test_a_body_that_came_with_the_head_needs_no_more() -> None:
    body = Counted(3)
    async with open_relay(body, body.feed(b"abc"), chunked=False) as ends:
        assert await ends.read() == b"abc"
        await ends.wait()


@pytest.mark.parametrize(("body", "fails"), [(Counted(5), True), (UntilClosed(), False)])
async def test_the_end_of_the_connection_ends_only_a_body_without_length(
    body: Body, fails: bool
) -> None:
    async with open_relay(body, chunked=False) as ends:
        ends.worker.send(b"abc")
        ends.worker.close()
        await ends.wait()
        assert await ends.read() == b"abc"
        assert (ends.error is not None) == fails


async def test_a_worker_that_dies_behind_a_stalled_client_loses_no_byte() -> None:
    """Nothing is watched meanwhile: a hang-up would be reported again and again."""
    async with open_relay(UntilClosed()) as ends:
        ends.worker.send(BIG[:60_000])
        ends.worker.close()
        before = time.process_time()
        await trio.sleep(0.3)
        assert time.process_time() - before < 0.15
        with trio.fail_after(5):
            assert unchunked(await ends.read_all()) == (BIG[:60_000], True)


async def test_bad_chunks_end_that_stream_only() -> None:
    async with (
        pumping() as pump,
        relaying(pump, Chunked(PeerError)) as ends,
        relaying(pump, Chunked()) as other,
    ):
        ends.worker.send(b"nonsense\r\n")
        await ends.wait()
        assert isinstance(ends.error, PeerError)
        other.worker.send(chunk(b"a"))
        assert await other.read() == chunk(b"a")


@pytest.mark.parametrize(
    "leave",
    [socket.socket.close, lambda client: client.shutdown(socket.SHUT_WR)],
    ids=["close", "half"],
)
@pytest.mark.parametrize("pending", [False, True])
async def test_a_client_that_leaves_is_noticed_while_nothing_comes(
    leave: Callable[[socket.socket], None], pending: bool
) -> None:
    async with open_relay(Chunked()) as ends:
        if pending:
            ends.worker.send(chunk(BIG))
            await wait_all_tasks_blocked()
        leave(ends.client)
        await ends.wait()
        assert ends.gone == ["the client has gone"]
        assert ends.error is None


async def test_a_stalled_client_takes_bounded_memory_and_is_lost_after_the_limit() -> None:
    async with open_relay(UntilClosed(), stall_limit=0.2) as ends:
        began = time.monotonic()
        sent = 0
        while not ends.over.is_set():
            try:
                sent += ends.worker.send(BIG)
            except BlockingIOError:
                await trio.sleep(0.01)
        assert 0.2 < time.monotonic() - began < 1
        assert ends.gone == ["the client does not read"]
        assert len(ends.relay.pending) < 70_000
        assert sent < 1_000_000


async def test_a_stalled_client_delays_no_other() -> None:
    async with (
        pumping() as pump,
        relaying(pump, UntilClosed()) as stalled,
        relaying(pump, Chunked()) as other,
    ):
        stalled.worker.send(BIG[:60_000])
        await wait_all_tasks_blocked()
        other.worker.send(chunk(b"a"))
        assert await other.read() == chunk(b"a")
        assert stalled.relay.pending


async def test_a_worker_that_falls_silent_is_given_up() -> None:
    async with open_relay(Chunked(), stall_limit=0.2, silence=0.2) as ends:
        ends.worker.send(chunk(b"a"))
        await ends.wait()
        assert ends.error is not None
        assert ends.error.code == "stalled"


async def test_a_reader_that_lags_is_no_silence_of_the_worker() -> None:
    async with open_relay(Chunked(), stall_limit=2, silence=0.3) as ends:
        ends.worker.send(chunk(BIG[:60_000]))
        await trio.sleep(1.2)
        assert not ends.over.is_set()
        ends.worker.send(LAST_CHUNK)
        with trio.fail_after(5):
            assert unchunked(await ends.read_all()) == (BIG[:60_000], True)
        assert ends.error is None


async def test_a_stream_whose_last_event_has_passed_is_whole_without_its_last_chunk() -> None:
    async with open_relay(Chunked(), events=WholeEvents()) as ends:
        ends.worker.send(chunk(b"data: [DONE]\n\n"))
        ends.worker.close()
        await ends.wait()
        assert ends.error is None
        assert await ends.read() == chunk(b"data: [DONE]\n\n") + LAST_CHUNK


async def test_cancelling_leaves_what_has_not_been_sent() -> None:
    async with open_relay(Chunked()) as ends:
        ends.worker.send(chunk(BIG[:60_000]))
        await wait_all_tasks_blocked()
        ends.scope.cancel()
        await ends.wait()
        got = await ends.read_all()
        assert unchunked(got + ends.relay.pending) == (BIG[:60_000], False)


async def test_a_handler_that_fails_harms_no_other(
    error_records: list[object],
) -> None:
    (ours, theirs), (fine, far) = socket.socketpair(), socket.socketpair()
    heard = trio.Event()

    def fail(events: int) -> None:
        raise RuntimeError("a bug")

    with ours, theirs, fine, far:
        async with open_poller() as poller:
            poller.add(ours.fileno(), IN, fail)
            poller.add(
                fine.fileno(), IN, lambda events: (heard.set(), poller.remove(fine.fileno()))
            )
            theirs.send(b"x")
            await wait_all_tasks_blocked()
            far.send(b"x")
            with trio.fail_after(5):
                await heard.wait()
            assert len(poller) == 0
    assert len(error_records) == 1
    error_records.clear()


@pytest.mark.parametrize("last", [b"end: all\n\n", b"no: end\n\n"])
async def test_what_is_pending_says_whether_anything_may_follow(last: bytes) -> None:
    events = WholeEvents(lambda event: event.startswith(b"end"), must_end=True)
    data = b"data: " + BIG[:50_000] + b"\n\n" + last
    async with open_relay(Chunked(), events=events) as ends:
        ends.worker.send(chunk(data) + LAST_CHUNK)
        await wait_all_tasks_blocked(0.05)
        ends.scope.cancel()
        await ends.wait()
        is_whole = last.startswith(b"end")
        assert ends.relay.has_ended == is_whole
        assert ends.relay.pending.endswith(last + b"\r\n" + (LAST_CHUNK if is_whole else b""))
        assert (ends.error is None) == is_whole
