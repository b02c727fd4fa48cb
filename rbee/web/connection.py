"""A client's connection: requests are read from it, one after the other, with a limit on each."""

from __future__ import annotations

import socket
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

import trio

from rbee.errors import BadInputError
from rbee.web.body import body_of_request
from rbee.web.head import RequestHead, TooSlowError, find_head
from rbee.web.line import Line
from rbee.web.patience import Patience
from rbee.web.poller import CLIENT_GONE, HUNG_UP, OUT, Gone, Poller
from rbee.web.router import MAX_BODY, too_large

HEAD = 10.0  # seconds for a head, once it has begun
LINGER = 1.0  # seconds in which a client who was refused may read why
PIECE = 1 << 16
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Connection:
    """One connection; its poller tells it when the client goes, until `let_go` (`watched`).

    Attributes:
        ahead: what has been received and belongs to nobody yet.
        client: its address and port.
        scope: of all that is done for it. One for all its requests: a scope takes as long as a
            head, and a client who goes away ends them all.
    """

    def __init__(self, stream: trio.SocketStream, poller: Poller) -> None:
        self.stream = stream
        self.line = Line(stream.socket.fileno())
        self.ahead = b""
        self.client = stream.socket.getpeername()
        self.scope = trio.CancelScope()
        self._poller = poller
        self._gone: Gone | None = None
        self._has_hung_up = False
        self._is_watched = True
        poller.add(self.line.fileno(), HUNG_UP, self._on_hang_up)

    def let_go(self) -> None:
        """Leave it to another; must come before it is closed.

        A second time it does nothing: once it is closed another connection may have its number.
        """
        if self._is_watched:
            self._is_watched = False
            self._poller.remove(self.line.fileno())

    def hang_up(self) -> None:
        """Let whoever waits for a request see its end."""
        with suppress(OSError):
            self.stream.socket.shutdown(socket.SHUT_RD)

    def watch(self, gone: Gone) -> None:
        """Tell of it when the client goes, or has gone already."""
        if self._has_hung_up:
            gone(CLIENT_GONE)
        self._gone = gone

    def unwatch(self) -> None:
        self._gone = None
        self._poller.change(self.line.fileno(), HUNG_UP, self._on_hang_up)

    def _on_hang_up(self, events: int) -> None:
        if not events & ~OUT:
            return
        self._has_hung_up = True
        self.let_go()
        if self._gone is not None:
            self._gone(CLIENT_GONE)

    async def read_ahead(self) -> bool:
        """Receive something; False at the connection's end."""
        data = await self.line.receive()
        self.ahead += data
        return bool(data)

    async def read_head(self) -> bytes:
        """Return the head that has begun, which stays in ``ahead`` as well; b"" if it breaks off.

        Raises:
            BadInputError: it is none, or too long.
            TooSlowError: it has not come within 10 s.
        """
        if size := self._find_head():
            return self.ahead[:size]
        with trio.move_on_after(HEAD):
            while await self.read_ahead():
                if size := self._find_head():
                    return self.ahead[:size]
            return b""
        raise TooSlowError(f"the head of a request must come within {HEAD:.0f} s")

    def _find_head(self) -> int:
        self.ahead = self.ahead.lstrip(b"\r\n")
        return find_head(self.ahead)

    async def linger(self) -> None:
        """Take what still comes for a moment: a reset would take the answer from the client."""
        with trio.move_on_after(LINGER), suppress(trio.BrokenResourceError):
            await self.stream.send_eof()
            while await self.stream.receive_some(PIECE):
                pass


@contextmanager
def watched(stream: trio.SocketStream, poller: Poller) -> Iterator[Connection]:
    """Make a connection of a stream; that is the caller's to close."""
    connection = Connection(stream, poller)
    try:
        with connection.scope:
            yield connection
    finally:
        connection.let_go()


class RequestBody:
    """The body of the request that is answered now, received when it is asked for."""

    def __init__(self, connection: Connection, head: RequestHead) -> None:
        self._connection = connection
        self._length = head.length or 0
        self._body = body_of_request(head.length)
        self._patience = Patience()
        self._awaits_word = (b"expect", b"100-continue") in head.headers

    @property
    def is_read(self) -> bool:
        return self._body.done and not self._body.rest

    def skip(self) -> None:
        """Drop what of the body has come.

        So who is refused on the head of a short request may send the next one.
        """
        with suppress(BadInputError):
            self._body.feed(self._connection.ahead)
            self._connection.ahead = b""

    async def receive(self) -> MutableMapping[str, Any]:
        """Return the next part, as ASGI has it.

        Raises:
            BadInputError: it is badly framed, or another request came before the answer.
            TooLargeError: its head says that it is larger than any may be.
            TooSlowError: it does not come as fast as it must.
        """
        if self._length > MAX_BODY:
            raise too_large()
        connection = self._connection
        data = b""
        while not data and not self._body.done:
            if not connection.ahead and not await self._read_ahead():
                return {"type": "http.disconnect"}
            data = self._body.feed(connection.ahead)
            connection.ahead = b""
        self._patience.size += len(data)
        if self._body.rest or connection.ahead:
            raise BadInputError("a request came before the one before it was answered")
        return {"type": "http.request", "body": data, "more_body": not self._body.done}

    async def _read_ahead(self) -> bool:
        if self._awaits_word:
            self._awaits_word = False
            await self._connection.line.send(CONTINUE)
        return await self._patience.wait(self._connection.read_ahead)
