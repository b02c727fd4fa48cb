"""The front door on a daemon's one port: it serves the data routes itself, on plain sockets.

Every other connection is handed over, with what was read of it, to the server for everything
(hypercorn: HTTP/2, HTTP/1.0, upgrades and the control routes). That one knows the data routes too,
for a client that has begun with something else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from email.utils import formatdate
from typing import Any

import trio

from rbee.errors import BadInputError, RbeeError, TooLargeError, leaves
from rbee.web.body import LAST_CHUNK, body_of_request, chunk
from rbee.web.door import Headers
from rbee.web.events import WholeEvents
from rbee.web.head import (
    RequestHead,
    TooSlowError,
    encode_answer,
    find_head,
    parse_request,
)
from rbee.web.out import has_events, is_short, read_all
from rbee.web.poller import HUNG_UP
from rbee.web.pump import Pump, Relay
from rbee.web.router import MAX_BODY, App, Asked, Response, error_response
from rbee.web.upstream import Answer

log = logging.getLogger(__name__)

KEEP_ALIVE = 75.0  # seconds that a connection may wait for its next request
HEAD = 10.0  # seconds for a head, once it has begun
BODY = 30.0  # seconds without a byte of a body
LINGER = 1.0  # seconds in which a client who was refused may read why
PIECE = 1 << 16
HTTP_2 = b"PRI * HTTP/2.0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CLOSE = (b"connection", b"close")

HandOver = Callable[[Any], Awaitable[None]]
"""Serves a connection, a stream as trio's, to its end."""


class Front:
    """Serves connections; data routes are those that ``app`` says are some."""

    def __init__(self, app: App, pump: Pump) -> None:
        self.app = app
        self.pump = pump
        self.is_closing = False
        self.waiting: set[trio.CancelScope] = set()

    def close_idle(self) -> None:
        """End the connections that wait for a request, and soon those that are answered now."""
        self.is_closing = True
        for scope in self.waiting:
            scope.cancel(reason="closing")

    async def serve(self, stream: trio.SocketStream, hand_over: HandOver) -> None:
        """Serve one connection to its end; what goes wrong on it ends it alone."""
        connection = _Connection(self, stream)
        try:
            while await connection.serve_next(hand_over):
                pass
        except* trio.BrokenResourceError:
            log.debug("a client went away")
        except* Exception as group:
            kind = type(next(leaves(group))).__name__  # the text may quote what the client sent
            log.info("dropped a connection that could not be served: %s", kind, exc_info=True)
        finally:
            await trio.aclose_forcefully(stream)


class _Connection:
    """One connection and what has been read ahead."""

    def __init__(self, front: Front, stream: trio.SocketStream) -> None:
        self.front = front
        self.stream = stream
        self.ahead = b""

    async def serve_next(self, hand_over: HandOver) -> bool:
        """Serve the next request; tell whether there may be another."""
        try:
            raw = await self._read_head()
            head = parse_request(raw) if raw not in (b"", HTTP_2) else None
        except BadInputError as error:
            await self._refuse(error)
            return False
        if not raw:
            return False
        if head is None or not self._is_ours(head):
            await hand_over(Replayed(self.stream, self.ahead))
            return False
        self.ahead = self.ahead[len(raw) :]
        return await self._answer(head)

    async def _read_head(self) -> bytes:
        """Return the next head, which stays in ``ahead`` as well; b"" if none comes."""
        if not self.ahead and not await self._wait():
            return b""
        if size := self._find_head():
            return self.ahead[:size]
        with trio.move_on_after(HEAD):
            while await self._read_ahead():
                if size := self._find_head():
                    return self.ahead[:size]
            return b""
        raise TooSlowError(f"the head of a request must come within {HEAD:.0f} s")

    async def _wait(self) -> bool:
        """Wait for the first byte of a request."""
        with trio.move_on_after(KEEP_ALIVE) as scope:
            if self.front.is_closing:
                return False
            self.front.waiting.add(scope)
            try:
                return await self._read_ahead()
            finally:
                self.front.waiting.discard(scope)
        return False

    async def _read_ahead(self) -> bool:
        data = await self.stream.receive_some(PIECE)
        self.ahead += data
        return bool(data)

    def _find_head(self) -> int:
        self.ahead = self.ahead.lstrip(b"\r\n")
        return find_head(self.ahead)

    def _is_ours(self, head: RequestHead) -> bool:
        return (
            head.version == "1.1"
            and not head.upgrades
            and self.front.app.has_data(head.method, head.path)
        )

    async def _answer(self, head: RequestHead) -> bool:
        body = RequestBody(self, head)
        out = SocketOut(self, head, body)
        client = self.stream.socket.getpeername()
        asked = Asked(head.method, head.path.decode("ascii"), head.headers, client, body.receive)
        await self.front.app.respond(asked, out)
        if not out.keeps and not out.is_lost:
            await self._linger()
        return out.keeps

    async def _refuse(self, error: RbeeError) -> None:
        """Answer what is no request."""
        answer = error_response(error)
        headers = (*_with_length(answer), CLOSE, _date())
        await self.stream.send_all(encode_answer(answer.status, headers) + answer.body)
        await self._linger()

    async def _linger(self) -> None:
        """Take what still comes for a moment: a reset would take the answer from the client."""
        with trio.move_on_after(LINGER), suppress(trio.BrokenResourceError):
            await self.stream.send_eof()
            while await self.stream.receive_some(PIECE):
                pass


class RequestBody:
    """The body of the request that is answered now, received when it is asked for."""

    def __init__(self, connection: _Connection, head: RequestHead) -> None:
        self._connection = connection
        self._length = head.length or 0
        self._body = body_of_request(head.length)
        self._awaits_word = (b"expect", b"100-continue") in head.headers

    @property
    def is_read(self) -> bool:
        return self._body.done and not self._body.rest

    async def receive(self) -> MutableMapping[str, Any]:
        """Return the next part, as ASGI has it.

        Raises:
            BadInputError: it is badly framed, or another request came before the answer.
            TooLargeError: its head says that it is larger than any may be.
            TooSlowError: nothing came for 30 s.
        """
        if self._length > MAX_BODY:
            raise TooLargeError(f"a request has at most {MAX_BODY >> 20} MiB; this one is larger")
        connection = self._connection
        data = b""
        while not data and not self._body.done:
            if not connection.ahead and not await self._read_ahead():
                return {"type": "http.disconnect"}
            data = self._body.feed(connection.ahead)
            connection.ahead = b""
        if self._body.rest or connection.ahead:
            raise BadInputError("a request came before the one before it was answered")
        return {"type": "http.request", "body": data, "more_body": not self._body.done}

    async def _read_ahead(self) -> bool:
        if self._awaits_word:
            self._awaits_word = False
            await self._connection.stream.send_all(CONTINUE)
        with trio.move_on_after(BODY):
            return await self._connection._read_ahead()
        raise TooSlowError(f"nothing of the body came for {BODY:.0f} s")


class SocketOut:
    """An answer that is written to a socket of ours (`rbee.web.out.Out`).

    Attributes:
        keeps: whether the answer is sent and another request may come.
        is_lost: whether the client has gone or does not read.
    """

    def __init__(self, connection: _Connection, head: RequestHead, body: RequestBody) -> None:
        self._front = connection.front
        self._stream = connection.stream
        self._head = head
        self._body = body
        self._scope = trio.CancelScope()
        self._events: WholeEvents | None = None
        self._pending = b""
        self.extra: Headers = ()
        self.begun = False
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
        self._events = WholeEvents() if has_events(headers) else None
        length = answer.head.length
        if length is None:
            await self.begin(answer.head.status, headers)
        else:
            framing = ((b"content-length", b"%d" % length),)
            await self._stream.send_all(self._encode(answer.head.status, (*framing, *headers))[1])
        relay = Relay(
            self._front.pump, answer.fileno(), self._stream.socket.fileno(), answer.body,
            self._lose, events=self._events, chunked=length is None, silence=silence,
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
        poller, fd = self._front.pump.poller, self._stream.socket.fileno()
        with self._scope:
            poller.add(fd, HUNG_UP, self._on_hang_up)
            try:
                yield
            finally:
                poller.remove(fd)

    def _on_hang_up(self, events: int) -> None:
        self._front.pump.poller.remove(self._stream.socket.fileno())
        self._lose("the client has gone")

    def _lose(self, why: str) -> None:
        self.is_lost = True
        self._scope.cancel(reason=why)

    def _may_keep(self) -> bool:
        return self._head.keeps_alive and self._body.is_read and not self._front.is_closing

    def _encode(self, status: int, headers: Headers) -> tuple[bool, bytes]:
        """Return whether another request may follow, and the head that says so."""
        self.begun = True
        keeps = self._may_keep()
        own: Headers = () if keeps else (CLOSE,)
        if not any(name == b"date" for name, _ in headers):
            own = (*own, _date())
        return keeps, encode_answer(status, (*headers, *self.extra, *own))


class Replayed:
    """A connection as it was before something was read of it."""

    def __init__(self, stream: trio.SocketStream, first: bytes) -> None:
        self._stream = stream
        self._first = first
        self.socket = stream.socket

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._first:
            return await self._stream.receive_some(max_bytes)
        await trio.lowlevel.checkpoint()
        size = len(self._first) if max_bytes is None else max_bytes
        data, self._first = self._first[:size], self._first[size:]
        return data

    async def send_all(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


def _with_length(answer: Response) -> Headers:
    return (
        (b"content-length", b"%d" % len(answer.body)),
        (b"content-type", answer.content_type),
        *answer.headers,
    )


_today: tuple[int, tuple[bytes, bytes]] = (0, (b"date", b""))


def _date() -> tuple[bytes, bytes]:
    """Return the header with the time, made once a second."""
    global _today
    now = int(time.time())
    if _today[0] != now:
        _today = (now, (b"date", formatdate(now, usegmt=True).encode("ascii")))
    return _today[1]
