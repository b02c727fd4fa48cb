"""An answer that is written straight to a client's socket, by the pump where it is passed on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from email.utils import formatdate

import trio

from rbee.web.body import LAST_CHUNK, chunk
from rbee.web.connection import LINGER, Connection
from rbee.web.door import Headers
from rbee.web.events import WholeEvents
from rbee.web.head import encode_answer
from rbee.web.out import has_events, is_short, read_all
from rbee.web.poller import Gone
from rbee.web.pump import Pump, Relay
from rbee.web.upstream import Answer

CLOSE = (b"connection", b"close")


class SocketOut:
    """An answer that is written to a socket of ours (`rbee.web.out.Out`).

    Args:
        may_keep: tells whether another request may follow on the connection.

    Attributes:
        keeps: whether the answer is sent and another request may come.
    """

    def __init__(self, connection: Connection, pump: Pump, may_keep: Callable[[], bool]) -> None:
        self._connection = connection
        self._line = connection.line
        self._pump = pump
        self._may_keep = may_keep
        self._events: WholeEvents | None = None
        self._pending = b""
        self._has_ended = False
        self.extra: Iterable[tuple[bytes, bytes]] = ()
        self.begun = False
        self.status = 0
        self.keeps = False
        self.is_lost = False

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        length = () if status == 204 else ((b"content-length", b"%d" % len(body)),)
        keeps, head = self._encode(status, (*length, *headers))
        await self._line.send(head + body)
        self.keeps = keeps

    async def begin(self, status: int, headers: Headers, first: bytes = b"") -> None:
        _, head = self._encode(status, ((b"transfer-encoding", b"chunked"), *headers))
        self._pending = head + chunk(first)
        self._events = WholeEvents() if has_events(headers) else None
        await self._flush()

    async def emit(self, data: bytes) -> None:
        self._pending = chunk(data)
        await trio.lowlevel.checkpoint()  # whoever emits may wait for nothing else
        await self._flush()

    async def _flush(self) -> None:
        """Send; cancelling leaves in ``_pending`` what has not been sent, for `end_with`."""
        while True:
            self._pending = self._pending[self._line.put(self._pending) :]
            if not self._pending:
                return
            await trio.lowlevel.wait_writable(self._line.fileno())

    async def end(self) -> None:
        await self._line.send(LAST_CHUNK)
        self.keeps = self._may_keep()

    async def pass_on(self, answer: Answer, headers: Headers, *, silence: float) -> None:
        if is_short(answer):
            await self.whole(answer.head.status, headers, await read_all(answer, silence))
            return
        length = answer.head.length
        if length is None:
            await self.begin(answer.head.status, headers)
        else:  # an event could not be added to a body whose length was told
            framing = ((b"content-length", b"%d" % length),)
            await self._line.send(self._encode(answer.head.status, (*framing, *headers))[1])
        await self._relay(answer, chunked=length is None, silence=silence)

    async def go_on(self, answer: Answer, events: WholeEvents, *, silence: float) -> None:
        self._events = events
        await self._relay(answer, chunked=True, silence=silence)

    async def _relay(self, answer: Answer, *, chunked: bool, silence: float) -> None:
        relay = Relay(
            self._pump, answer.fileno(), self._line.fileno(), answer.body,
            self._lose, events=self._events, chunked=chunked, silence=silence,
            pace=answer.pace,
        )  # fmt: skip
        try:
            await relay.run(answer.first)
        finally:
            self._pending, self._has_ended = relay.pending, relay.has_ended
        self.keeps = self._may_keep()

    async def end_with(self, last: bytes) -> None:
        if self._events is None or self._events.torn or self.is_lost:
            return
        rest = b"" if self._has_ended else chunk(last) + LAST_CHUNK
        with trio.move_on_after(LINGER):
            self._pending += rest
            await self._flush()

    def watching(self) -> AbstractAsyncContextManager[None]:
        return _Watching(self._connection, self._lose)

    def _lose(self, why: str) -> None:
        self.is_lost = True
        self._connection.scope.cancel(reason=why)

    def _encode(self, status: int, headers: Headers) -> tuple[bool, bytes]:
        """Return whether another request may follow, and the head that says so."""
        self.begun = True
        self.status = status
        keeps = self._may_keep()
        own: Headers = () if keeps else (CLOSE,)
        if b"date" not in [name for name, _ in headers]:
            own = (*own, date())
        return keeps, encode_answer(status, (*headers, *self.extra, *own))


class _Watching(AbstractAsyncContextManager[None]):
    """Watches a client while the body runs."""

    __slots__ = ("_connection", "_gone")

    def __init__(self, connection: Connection, gone: Gone) -> None:
        self._connection = connection
        self._gone = gone

    async def __aenter__(self) -> None:
        self._connection.watch(self._gone)

    async def __aexit__(self, *_: object) -> None:
        self._connection.unwatch()


_today: tuple[int, tuple[bytes, bytes]] = (0, (b"date", b""))


def date() -> tuple[bytes, bytes]:
    """Return the header with the time, made once a second."""
    global _today
    now = int(time.time())
    if _today[0] != now:
        _today = (now, (b"date", formatdate(now, usegmt=True).encode("ascii")))
    return _today[1]
