"""Work that tells what it does while it does it, as a stream of server-sent events."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from rbee.errors import MachineError, RbeeError, leaves
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
        await emit(sse.encode(last))

    return Stream(run)


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
