"""Where a job's events go: down the connection that asked for it, or into a log."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import trio

from rbee.errors import PeerError, RbeeError
from rbee.queen.asking import STALL
from rbee.queen.event_log import EventLog
from rbee.web.events import WholeEvents
from rbee.web.out import STREAM, Out, pass_whole
from rbee.web.upstream import Answer
from rbee.wire import messages, sse
from rbee.wire.messages import Error, Narration, Queued

log = logging.getLogger(__name__)

MOST = 64  # of the queen's own events that may wait for a slow reader


def job_events() -> WholeEvents:
    return WholeEvents(sse.is_terminal, must_end=True)


def last_event(error: RbeeError) -> bytes:
    return sse.encode(Error(error.code, error.message, error.hint, error.details))


class Delivery(Protocol):
    """The way of one job's events.

    Attributes:
        has_passed: whether anything of a worker's answer has been passed on.
        is_over: whether a worker's terminal event has been.
    """

    @property
    def has_passed(self) -> bool: ...

    @property
    def is_over(self) -> bool: ...

    def tell(self, event: Queued | Narration) -> None:
        """Pass on an event of the queen's; lost while a worker answers, or if nobody reads."""
        ...

    def telling(self) -> AbstractAsyncContextManager[None]:
        """Deliver what is told while the body runs, once that waits for something.

        So what is refused at once is refused before anything has begun.
        """
        ...

    async def pass_on(self, answer: Answer) -> None:
        """Pass on a worker's events, to the terminal one.

        Raises:
            PeerError: they break off.
        """
        ...


class Connected:
    """Events go to a client who waits for them; see `Delivery`."""

    def __init__(self, out: Out, job_id: str) -> None:
        self._out = out
        self._head = (*STREAM, (messages.JOB_ID_HEADER.encode(), job_id.encode()))
        self._events: WholeEvents | None = None
        self._told: list[bytes] = []
        self._wake = trio.Event()
        self._sending = trio.Lock()  # frames of two tasks must not mix
        self._is_quiet = False
        self._is_complete = False

    @property
    def has_passed(self) -> bool:
        return self._events is not None and self._events.has_any

    @property
    def is_over(self) -> bool:
        return self._events is not None and self._events.is_done

    def tell(self, event: Queued | Narration) -> None:
        if self._is_quiet or len(self._told) >= MOST:
            log.debug("lost: %s", event)
            return
        self._told.append(sse.encode(event))
        self._wake.set()

    @asynccontextmanager
    async def telling(self) -> AsyncGenerator[None, None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_telling)
            try:
                yield
            finally:
                if self._sending.locked():  # not in the middle of an event
                    async with self._sending:
                        pass
            nursery.cancel_scope.cancel(reason="all is told")

    async def _keep_telling(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            self._wake = trio.Event()
            async with self._sending:
                await self._send_told()
            await self._wake.wait()

    async def _send_told(self) -> None:
        data = b"".join(self._told)
        self._told.clear()
        if not self._out.begun:
            await self._out.begin(200, self._head, data)
        elif data:
            await self._out.emit(data)

    async def pass_on(self, answer: Answer) -> None:
        async with self._sending:
            await self._send_told()
            self._events = job_events()
            self._is_quiet = True
            try:
                await self._out.go_on(answer, self._events, silence=STALL)
                self._is_complete = True
            finally:
                self._is_quiet = self.is_over

    async def end(self, error: RbeeError | None) -> None:
        """Send what is missing: ``error`` as the terminal event, unless there was one.

        Raises:
            RbeeError: ``error``, if nothing has been sent: it can be a plain refusal.
        """
        if error is not None and not self._out.begun:
            raise error
        if not self._is_complete:
            assert error is not None or self.is_over
            await self._out.end_with(b"" if error is None else last_event(error))


class Kept:
    """Events go into a log; see `Delivery`.

    Args:
        ended: called when a worker's terminal event is in it; its answer may still have an end.

    Attributes:
        accepted: set once the job is under way or has been refused.
        refusal: why it was.
    """

    def __init__(self, log: EventLog, ended: Callable[[], None]) -> None:
        self._log = log
        self._ended = ended
        self._events: WholeEvents | None = None
        self._is_under_way = False
        self.accepted = trio.Event()
        self.refusal: RbeeError | None = None

    @property
    def has_passed(self) -> bool:
        return self._events is not None and self._events.has_any

    @property
    def is_over(self) -> bool:
        return self._events is not None and self._events.is_done

    def tell(self, event: Queued | Narration) -> None:
        self._log.extend(sse.encode(event))

    @asynccontextmanager
    async def telling(self) -> AsyncGenerator[None, None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._accept)
            yield
            nursery.cancel_scope.cancel(reason="all is told")

    async def _accept(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._is_under_way = True
        self.accepted.set()

    async def pass_on(self, answer: Answer) -> None:
        self._events = job_events()
        await pass_whole(answer, self._events, self._take, STALL)

    async def _take(self, events: bytes) -> None:
        if self._events is not None and self._events.torn:
            raise PeerError(f"an event longer than {sse.MAX_EVENT} bytes")
        self._log.extend(events)
        if self.is_over:
            self._ended()
            self._log.end()

    def end(self, error: RbeeError | None) -> None:
        """Complete the log with ``error``, if there is one, and let its readers know."""
        if not self._is_under_way:
            self.refusal = error
        if error is not None:
            self._log.extend(last_event(error))
        self._log.end()
        self.accepted.set()
