"""Where an answer goes: to hypercorn (`AsgiOut`) or straight to a socket (`rbee.web.front`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import trio

from rbee.errors import PeerError
from rbee.trace import Elsewhere
from rbee.units import human
from rbee.web.door import Headers
from rbee.web.events import WholeEvents
from rbee.web.exchange import BROKEN
from rbee.web.head import end_to_end
from rbee.web.upstream import Answer
from rbee.wire import sse

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

STREAM: Headers = (
    (b"content-type", sse.CONTENT_TYPE),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
WHOLE = 64 << 10  # bytes of a body up to which it is had in full before its head is sent
LARGEST = 1 << 20  # bytes of a body that is read in full: one of those, or an error
SILENCE = 60.0  # seconds in such a body, whose end the peer knows when it sends the head


class Out(Protocol):
    """One answer on its way.

    Attributes:
        extra: headers that it gets whatever it is; looked at when the head is sent.
        begun: whether its head is sent, so that it cannot be another any more.
        status: that of the head; 0 before it is sent.
        is_lost: whether the client has gone or does not read.
    """

    extra: Iterable[tuple[bytes, bytes]]
    begun: bool
    status: int
    is_lost: bool

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Send an answer whose body is here."""
        ...

    async def begin(self, status: int, headers: Headers, first: bytes = b"") -> None:
        """Send the head of an answer whose length is not known, and the first part of it."""
        ...

    async def emit(self, data: bytes) -> None:
        """Send a part of the body; of a stream of events, whole ones."""
        ...

    async def end(self) -> None:
        """End the body."""
        ...

    async def pass_on(self, answer: Answer, headers: Headers, *, silence: float) -> None:
        """Send what another has answered, to its end; ``headers`` instead of its own.

        Raises:
            PeerError: it breaks off, or nothing comes for ``silence`` seconds; `end_with` can
                follow if ``begun``.
        """
        ...

    async def go_on(self, answer: Answer, events: WholeEvents, *, silence: float) -> None:
        """Send another's events, to their end, in a stream that has begun.

        Args:
            events: fresh; tells afterwards what has passed.

        Raises:
            PeerError: as `pass_on`, or the last event is none to end with.
        """
        ...

    async def end_with(self, last: bytes) -> None:
        """End an answer that broke off, with one event more.

        It is cut instead, so that the client sees that something is missing, if it is no stream of
        events or if one of them is torn.
        """
        ...

    def watching(self) -> AbstractAsyncContextManager[None]:
        """Cancel the body of the ``async with``, or all of the connection, when he goes away."""
        ...


def headers_of(answer: Answer) -> Headers:
    """Return the headers of an answer that can be passed on."""
    return end_to_end(answer.head.headers)


def has_events(headers: Headers) -> bool:
    for name, value in headers:
        if name == b"content-type" and value.lower().startswith(sse.CONTENT_TYPE):
            return True
    return False


def is_short(answer: Answer) -> bool:
    """Tell whether a body is to be had in full before its head is sent: it may break off."""
    length = answer.head.length
    return answer.body.done or (length is not None and length <= WHOLE)


async def next_part(answer: Answer, silence: float) -> bytes:
    """Return what has come of a body, b"" at its end; raise `PeerError` after a silence."""
    if answer.body.done:  # a scope costs a short answer more than its body does
        return await answer.chunk()
    with trio.move_on_after(silence):
        return await answer.chunk()
    raise PeerError(f"nothing came for {silence:g} s", code="stalled")


async def pass_whole(
    answer: Answer, events: WholeEvents, pass_on: Callable[[bytes], Awaitable[None]], silence: float
) -> None:
    """Pass on a body's events as they come, to its end.

    Raises:
        PeerError: it breaks off, and not just behind its last event, or ends without one.
    """
    try:
        while data := await next_part(answer, silence):
            if whole := events.feed(data):
                await pass_on(whole)
    except PeerError:
        if not events.is_done:  # else all but the last chunk came
            raise
    if events.lacks_end:
        raise PeerError("the answer ended without its last event", code=BROKEN)
    if rest := events.rest():
        await pass_on(rest)


async def read_all(answer: Answer, silence: float = SILENCE) -> bytes:
    """Return a body in full.

    Raises:
        PeerError: it breaks off, is larger than 1 MiB, or nothing comes for ``silence`` seconds, 60
            at most.
    """
    if answer.body.done:  # as of most short ones, which came with their head
        return await answer.chunk()
    parts, size = [], 0
    with Elsewhere():
        while part := await next_part(answer, min(silence, SILENCE)):
            parts.append(part)
            size += len(part)
            if size > LARGEST:
                raise PeerError(f"an answer that is read in full has more than {human(LARGEST)}")
    return parts[0] if len(parts) == 1 else b"".join(parts)


class AsgiOut:
    """An answer that an ASGI server sends."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._events: WholeEvents | None = None
        self.extra: Iterable[tuple[bytes, bytes]] = ()
        self.begun = False
        self.status = 0
        self.is_lost = False

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        await self.begin(status, ((b"content-length", b"%d" % len(body)), *headers))
        await self._send({"type": "http.response.body", "body": body})

    async def begin(self, status: int, headers: Headers, first: bytes = b"") -> None:
        self.begun = True
        self._events = WholeEvents() if has_events(headers) else None
        self.status = status
        start = {"type": "http.response.start", "status": status}
        await self._send({**start, "headers": [*headers, *self.extra]})
        if first:
            await self.emit(first)

    async def emit(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def pass_on(self, answer: Answer, headers: Headers, *, silence: float) -> None:
        if is_short(answer):
            await self.whole(answer.head.status, headers, await read_all(answer, silence))
            return
        await self.begin(answer.head.status, headers)
        if self._events is not None:
            await pass_whole(answer, self._events, self.emit, silence)
        else:
            while data := await next_part(answer, silence):
                await self.emit(data)
        await self.end()

    async def go_on(self, answer: Answer, events: WholeEvents, *, silence: float) -> None:
        self._events = events
        await pass_whole(answer, events, self.emit, silence)
        await self.end()

    async def end_with(self, last: bytes) -> None:
        if self._events is not None and not self._events.torn:
            await self.emit(last)
            await self.end()

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None, None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_on_disconnect, nursery.cancel_scope)
            yield
            nursery.cancel_scope.cancel(reason="answered")

    async def _cancel_on_disconnect(self, scope: trio.CancelScope) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.is_lost = True
        scope.cancel(reason="client disconnected")
