"""The front door on a daemon's one port: it serves the data routes itself, on plain sockets.

Every other connection is handed over, with what was read of it, to the server for everything
(hypercorn: HTTP/2, HTTP/1.0, upgrades and the control routes). That one knows the data routes too,
for a client that has begun with something else.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from rbee.errors import BadInputError, RbeeError, leaves
from rbee.trace import REQUEST_ID, Tracing, trace_of
from rbee.web.connection import Connection, RequestBody, watched
from rbee.web.head import RequestHead, encode_answer, parse_request
from rbee.web.pump import Pump
from rbee.web.router import App, Asked, error_response
from rbee.web.socket_out import CLOSE, SocketOut, date

log = logging.getLogger(__name__)

KEEP_ALIVE = 75.0  # seconds that a connection may wait for its next request
HTTP_2 = b"PRI * HTTP/2.0\r\n\r\n"

HandOver = Callable[[Any], Awaitable[None]]
"""Serves a connection, a stream as trio's, to its end."""


class Front:
    """Serves connections; data routes are those that ``app`` says are some."""

    def __init__(self, app: App, pump: Pump) -> None:
        self.app = app
        self.pump = pump
        self.is_closing = False
        self._waiting: dict[Connection, float] = {}  # since when, the longest first
        pump.look_too.append(self._look)

    def close_idle(self) -> None:
        """End the connections that wait for a request, and soon those that are answered now."""
        self.is_closing = True
        for connection in self._waiting:
            connection.hang_up()

    def _look(self, now: float) -> None:
        """End the connections that have waited for too long."""
        for connection, since in self._waiting.items():
            if now - since < KEEP_ALIVE:
                return
            connection.hang_up()

    async def serve(self, stream: trio.SocketStream, hand_over: HandOver) -> None:
        """Serve one connection to its end; what goes wrong on it ends it alone."""
        try:
            with watched(stream, self.pump.poller) as connection:
                while await self._serve_next(connection, hand_over):
                    pass
        except* (trio.BrokenResourceError, OSError):
            log.debug("a client went away")
        except* Exception as group:
            error = next(leaves(group))  # its text may quote what the client sent
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind, line = type(error).__name__, where.lineno or 0
            log.info("dropped a connection: %s in %s, line %d", kind, where.name, line)
        finally:
            await trio.aclose_forcefully(stream)

    async def _serve_next(self, connection: Connection, hand_over: HandOver) -> bool:
        """Serve the next request; tell whether there may be another."""
        if not connection.ahead and not await self._wait(connection):
            return False
        try:
            raw = await connection.read_head()
            head = parse_request(raw) if raw not in (b"", HTTP_2) else None
        except BadInputError as error:
            await _refuse(connection, error)
            return False
        if not raw:
            return False
        if head is None or not self._is_ours(head):
            connection.let_go()
            await hand_over(Replayed(connection.stream, connection.ahead))
            return False
        connection.ahead = connection.ahead[len(raw) :]
        return await self._answer(connection, head)

    async def _wait(self, connection: Connection) -> bool:
        """Wait for the first byte of a request."""
        if self.is_closing:
            return False
        # A scope with a deadline would cost each request more than its head does.
        self._waiting[connection] = time.monotonic()
        try:
            return await connection.read_ahead()
        finally:
            del self._waiting[connection]

    def _is_ours(self, head: RequestHead) -> bool:
        plain = head.version == "1.1" and not head.upgrades
        return plain and self.app.has_data(head.method, head.path)

    async def _answer(self, connection: Connection, head: RequestHead) -> bool:
        body = RequestBody(connection, head)
        out = SocketOut(connection, self.pump, partial(self._may_keep, head, body))
        asked = Asked(
            head.method, head.path, head.headers, connection.client, body.receive, body.skip
        )
        await self.app.respond(asked, out)
        if not out.keeps and not out.is_lost:
            await connection.linger()
        return out.keeps

    def _may_keep(self, head: RequestHead, body: RequestBody) -> bool:
        return head.keeps_alive and body.is_read and not self.is_closing


async def _refuse(connection: Connection, error: RbeeError) -> None:
    """Answer what is no request."""
    trace = trace_of(())
    with Tracing(trace):
        answer = error_response(error)
    length = (b"content-length", b"%d" % len(answer.body))
    kind = (b"content-type", answer.content_type)
    named = (REQUEST_ID, trace.id.encode())
    head = encode_answer(answer.status, (length, kind, *answer.headers, named, CLOSE, date()))
    await connection.line.send(head + answer.body)
    await connection.linger()


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
