"""Work that tells what it does while it does it, as a stream of server-sent events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from rbee.errors import MachineError, RbeeError, leaves
from rbee.trace import current
from rbee.web.router import Emit, Stream
from rbee.wire import sse
from rbee.wire.messages import Error, Narration

log = logging.getLogger(__name__)

BUFFER = 64

Tell = Callable[[Narration], None]
Work = Callable[[Tell], Awaitable[Any]]


def narrated(work: Work) -> Stream:
    """Stream what ``work`` tells and, as the one last event, what it returns or its error.

    The work is cancelled when the reader goes; what it tells faster than he reads is lost.
    """

    async def run(emit: Emit) -> None:
        send, receive = trio.open_memory_channel[Narration](BUFFER)

        def tell(narration: Narration) -> None:
            try:
                send.send_nowait(narration)
            except trio.WouldBlock:
                log.debug("narration lost: %s", narration.text)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_emit_all, receive, emit)
            with send:
                last = await _last_event(work, tell)
        current().is_told = True
        await emit(sse.encode(last))

    return Stream(run)


@attrs.define(eq=False)
class Works:
    """The narrated works of one daemon: also when that stops, each gets its one last event.

    Attributes:
        ending: makes the error that says why they end.
    """

    ending: Callable[[], RbeeError]
    _scopes: set[trio.CancelScope] = attrs.field(factory=set)
    _is_over: bool = False

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        """Let works run while the body does; HTTP has to outlive it."""
        try:
            yield
        finally:
            self._is_over = True
            for scope in self._scopes:
                scope.cancel(reason="the daemon stops")

    def narrated(self, work: Work) -> Stream:
        """Do as `narrated`, until the daemon stops."""

        async def work_on(tell: Tell) -> Any:
            if self._is_over:
                raise self.ending()
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                try:
                    return await work(tell)
                finally:
                    self._scopes.discard(scope)
            raise self.ending()

        return narrated(work_on)


async def _emit_all(narrations: trio.MemoryReceiveChannel[Narration], emit: Emit) -> None:
    async for narration in narrations:
        await emit(sse.encode(narration))


async def _last_event(work: Work, tell: Tell) -> Any:
    last: Any = None
    try:
        last = await work(tell)
    except* (RbeeError, OSError) as group:
        exc = next(leaves(group))
        error = exc if isinstance(exc, RbeeError) else MachineError(f"{type(exc).__name__}: {exc}")
        log.info("%s: %s", error.code, error)
        last = Error(error.code, error.message, error.hint, error.details)
    return last
