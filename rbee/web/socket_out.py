"""An answer that is written straight to a client's socket, by the pump where it is passed on."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from email.utils import formatdate

import trio

from rbee.web.body import LAST_CHUNK, chunk
from rbee.web.connection import LINGER
from rbee.web.door import Headers
from rbee.web.events import WholeEvents
from rbee.web.head import encode_answer
from rbee.web.out import has_events, is_short, read_all
from rbee.web.poller import HUNG_UP
from rbee.web.pump import Pump, Relay
from rbee.web.upstream import Answer

CLOSE = (b"connection", b"close")


class SocketOut:
    """An answer that is written to a socket of ours (`rbee.web.out.Out`).

    Args:
        may_keep: tells whether another request may follow on the connection.

    Attributes:
        keeps: whether the answer is sent and another request may come.
        is_lost: whether the client has gone or does not read.
    """

    def __init__(self, stream: trio.SocketStream, pump: Pump, may_keep: Callable[[], bool]) -> None:
        self._stream = stream
        self._pump = pump
        self._may_keep = may_keep
        self._scope = trio.CancelScope()
        self._events: WholeEvents | None = None
        self._pending = b""
        self.extra: Iterable[tuple[bytes, bytes]] = ()
        self.begun = False
        self.status = 0
        self.keeps = False
        self.is_lost = False

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        length = () if status == 204 else ((b"content-length", b"%d" % len(body)),)
        keeps, head = self._encode(status, (*length, *headers))
        await self._stream.send_all(head + body)
        self.keeps = keeps

    async def begin(self, status: int, headers: Headers) -> None:
        _, head = self._encode(status, ((b"transfer-encoding", b"chunked"), *headers))
        await self._stream.send_all(head)

    async def emit(self, data: bytes) -> None:
        await self._stream.send_all(chunk(data))

    async def end(self) -> None:
        await self._stream.send_all(LAST_CHUNK)
        self.keeps = self._may_keep()

    async def pass_on(self, answer: Answer, headers: Headers, *, silence: float) -> None:
        if is_short(answer):
            await self.whole(answer.head.status, headers, await read_all(answer))
            return
        length = answer.head.length
        # An event could not be added to a body whose length was told.
        self._events = WholeEvents() if length is None and has_events(headers) else None
        if length is None:
            await self.begin(answer.head.status, headers)
        else:
            framing = ((b"content-length", b"%d" % length),)
            await self._stream.send_all(self._encode(answer.head.status, (*framing, *headers))[1])
        relay = Relay(
            self._pump, answer.fileno(), self._stream.socket.fileno(), answer.body,
            self._lose, events=self._events, chunked=length is None, silence=silence,
            pace=answer.pace,
        )  # fmt: skip
        try:
            await relay.run(answer.first)
        finally:
            self._pending = relay.pending
        self.keeps = self._may_keep()

    async def end_with(self, last: bytes) -> None:
        if self._events is None or self._events.torn or self.is_lost:
            return
        with trio.move_on_after(LINGER):
            await self._stream.send_all(self._pending + chunk(last) + LAST_CHUNK)

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None, None]:
        poller, fd = self._pump.poller, self._stream.socket.fileno()
        with self._scope:
            poller.add(fd, HUNG_UP, self._on_hang_up)
            try:
                yield
            finally:
                poller.remove(fd)

    def _on_hang_up(self, events: int) -> None:
        self._pump.poller.remove(self._stream.socket.fileno())
        self._lose("the client has gone")

    def _lose(self, why: str) -> None:
        self.is_lost = True
        self._scope.cancel(reason=why)

    def _encode(self, status: int, headers: Headers) -> tuple[bool, bytes]:
        """Return whether another request may follow, and the head that says so."""
        self.begun = True
        self.status = status
        keeps = self._may_keep()
        own: Headers = () if keeps else (CLOSE,)
        if not any(name == b"date" for name, _ in headers):
            own = (*own, date())
        return keeps, encode_answer(status, (*headers, *self.extra, *own))


_today: tuple[int, tuple[bytes, bytes]] = (0, (b"date", b""))


def date() -> tuple[bytes, bytes]:
    """Return the header with the time, made once a second."""
    global _today
    now = int(time.time())
    if _today[0] != now:
        _today = (now, (b"date", formatdate(now, usegmt=True).encode("ascii")))
    return _today[1]
