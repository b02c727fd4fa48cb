"""Bodies of answers on their way from a worker's socket to a client's, all by one task.

Each piece is received, followed to see where the body ends, and sent: no task switch, no cancel
scope. While a client does not take what is pending, nothing more is received for him, so the
memory of a stream is bounded by one piece. The source is then not watched at all: epoll reports a
hang-up even to who asked for no event, while what was sent before it waits to be received.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import trio

from rbee.errors import PeerError, RbeeError
from rbee.scopes import open_service
from rbee.web.body import LAST_CHUNK, Body, chunk
from rbee.web.events import WholeEvents
from rbee.web.pace import Pace
from rbee.web.poller import CLIENT_GONE, HUNG_UP, IN, OUT, Gone, Poller

log = logging.getLogger(__name__)

PIECE = 1 << 16
LOOK = 1.0  # seconds between two looks for streams that stand still
BROKEN = "stream_broken"


class Pump:
    """All relays of one server; made by `open_pump`.

    Attributes:
        poller: watches their sockets, and may watch others.
        stall_limit: seconds for which a client may take nothing of what is pending for him.
        look_too: called every second or so with the time, for others that watch for silence.
    """

    def __init__(self, poller: Poller, stall_limit: float) -> None:
        self.poller = poller
        self.stall_limit = stall_limit
        self.look_too: list[Callable[[float], None]] = []
        self._relays: set[Relay] = set()

    def __len__(self) -> int:
        return len(self._relays)

    async def _keep_looking(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while True:
            await trio.sleep(min(LOOK, self.stall_limit / 2))
            now = time.monotonic()
            for relay in list(self._relays):
                relay.look(now)
            for look in self.look_too:
                look(now)


@asynccontextmanager
async def open_pump(poller: Poller, stall_limit: float) -> AsyncGenerator[Pump, None]:
    """Run a pump until the body has ended."""
    pump = Pump(poller, stall_limit)
    async with open_service(pump._keep_looking):
        yield pump


class Relay:
    """One body from ``source`` to ``sink``, descriptors of sockets that do not block.

    The sink must be in the poller already, for its hang-up; it is again when `run` has ended.

    Args:
        body: follows what comes from the source.
        events: lets whole server-sent events through only; None for any other body.
        chunked: whether the client gets chunks; else he gets the bytes as they are.
        silence: seconds without a byte after which the source is given up.
        pace: is told of each piece.

    Attributes:
        pending: what the client has not taken yet.
        has_ended: whether all that is to come is sent or pending, the end of the body too.
    """

    __slots__ = (
        "_body", "_chunked", "_done", "_error", "_events", "_gone", "_heard", "_pace", "_pump",
        "_silence", "_sink", "_source", "_stalled", "_watches_source", "has_ended", "pending",
    )  # fmt: skip

    def __init__(
        self,
        pump: Pump,
        source: int,
        sink: int,
        body: Body,
        gone: Gone,
        *,
        events: WholeEvents | None = None,
        chunked: bool = True,
        silence: float = float("inf"),
        pace: Pace | None = None,
    ) -> None:
        self._pump = pump
        self._source = source
        self._sink = sink
        self._body = body
        self._gone = gone
        self._events = events
        self._chunked = chunked
        self._silence = silence
        self._pace = pace
        self._heard = time.monotonic()
        self._stalled = 0.0
        self._watches_source = False
        self._done: trio.Event | None = None
        self._error: RbeeError | None = None
        self.has_ended = False
        self.pending = b""

    async def run(self, first: bytes = b"") -> None:
        """Pass on what came with the head, then all the rest; return when the client has it.

        Cancelling, like an error, leaves in ``pending`` what has not been sent.

        Raises:
            PeerError: the source broke off, fell silent or is wrong in its framing.
        """
        done = self._done = trio.Event()
        poller = self._pump.poller
        poller.change(self._sink, HUNG_UP, self._on_sink)
        self._pump._relays.add(self)
        try:
            self._watch_source()
            if first and self._pace is not None:
                self._pace.piece(first, time.monotonic())
            self._pass_on(first)
            await done.wait()
        finally:
            self._pump._relays.discard(self)
            self._ignore_source()
            poller.change(self._sink, HUNG_UP, self._on_late)
        if self._error is not None:
            raise self._error

    def look(self, now: float) -> None:
        """End it if either side stands still for too long."""
        if self.pending:
            if now - self._stalled > self._pump.stall_limit:
                self._lose("the client does not read")
        elif now - self._heard > self._silence:
            self._end(PeerError(f"nothing came for {self._silence:g} s", code="stalled"))

    # from the source -------------------------------------------------------------------------
    def _on_source(self, events: int) -> None:
        try:
            self._receive(os.read(self._source, PIECE))
        except BlockingIOError:
            return
        except OSError as exc:
            self._break_off(f"the connection broke: {exc.strerror}")
        except RbeeError as error:
            self._end(error)
        except Exception:  # a bug, which ends this stream only
            log.exception("a stream could not be passed on")
            self._end(RbeeError("internal error, see the log"))

    def _receive(self, data: bytes) -> None:
        if data:
            self._heard = now = time.monotonic()
            data = self._body.feed(data)
            if data and self._pace is not None:
                self._pace.piece(data, now)
            self._pass_on(data)
        elif self._body.ends_with_connection:
            self._body.done = True
            self._pass_on(b"")
        else:
            self._break_off("the connection ended in the middle of the answer")

    def _pass_on(self, data: bytes) -> None:
        if self._body.done:
            self._pass_last(data)
            return
        if self._events is not None:
            data = self._events.feed(data)
        if data:
            self._send(chunk(data) if self._chunked else data)

    def _pass_last(self, data: bytes) -> None:
        broken = False
        if self._events is not None:
            data = self._events.feed(data)
            broken = self._events.lacks_end
            data += b"" if broken else self._events.rest()
        self.has_ended = not broken
        if self._chunked:
            data = chunk(data)
            if self.has_ended:
                data += LAST_CHUNK
        if data:
            self._send(data)
        if broken:
            self._end(PeerError("the answer ended without its last event", code=BROKEN))
        elif not self.pending:
            self._end(None)

    def _break_off(self, why: str) -> None:
        if self._events is not None and self._events.is_done:  # all but the last chunk came
            self._body.done = True
            self._pass_on(b"")
        else:
            self._end(PeerError(why, code=BROKEN))

    # to the sink -----------------------------------------------------------------------------
    def _send(self, data: bytes) -> None:
        if self.pending:
            self.pending += data
            return
        sent = self._try(data)
        if 0 <= sent < len(data):
            self.pending = data[sent:]
            self._stalled = time.monotonic()
            self._ignore_source()
            self._pump.poller.change(self._sink, HUNG_UP | OUT)

    def _on_sink(self, events: int) -> None:
        if events & ~OUT:
            self._lose(CLIENT_GONE)
        elif events and self.pending:
            self._flush()

    def _flush(self) -> None:
        sent = self._try(self.pending)
        if sent > 0:
            self._stalled = time.monotonic()
            self.pending = self.pending[sent:]
        if self.pending or sent < 0:
            return
        self._pump.poller.change(self._sink, HUNG_UP)
        self._heard = time.monotonic()  # what came meanwhile has only waited
        if self._pace is not None:
            self._pace.rest()
        if self._body.done:
            self._end(None)
        else:
            self._watch_source()

    def _try(self, data: bytes) -> int:
        """Return how much could be sent; -1 if the client has gone."""
        try:
            return os.write(self._sink, data)
        except BlockingIOError:
            return 0
        except OSError:
            self._lose(CLIENT_GONE)
            return -1

    # its end ---------------------------------------------------------------------------------
    def _lose(self, why: str) -> None:
        self._ignore_source()
        self._pump.poller.remove(self._sink)
        self._gone(why)

    def _end(self, error: RbeeError | None) -> None:
        if self._done is not None and self._done.is_set():
            return
        self._error = error
        self._ignore_source()
        if self._done is not None:
            self._done.set()

    def _on_late(self, events: int) -> None:
        """He goes before the connection is taken back, as while his last event is written."""
        if events & ~OUT:
            self._lose(CLIENT_GONE)

    def _watch_source(self) -> None:
        if not self._watches_source:
            self._watches_source = True
            self._pump.poller.add(self._source, IN, self._on_source)

    def _ignore_source(self) -> None:
        if self._watches_source:
            self._watches_source = False
            self._pump.poller.remove(self._source)
