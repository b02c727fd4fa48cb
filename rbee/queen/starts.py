"""Workers that somebody asks for by name, not by a job: asked for, and told of until ready."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from rbee.errors import RbeeError
from rbee.model import LOCALHOST
from rbee.models.reference import shown
from rbee.queen.hives import Hives
from rbee.queen.jobs import Jobs
from rbee.web.router import Emit
from rbee.wire import sse
from rbee.wire.messages import Error, Narration, StartWorker, WorkerInfo

BUFFER = 64

Narrate = Callable[[Narration], None]


async def ask(hives: Hives, request: StartWorker, narrate: Narrate) -> WorkerInfo:
    """Have a hive start a worker; it is on its way when this returns."""
    hive = await hives.get(request.node or LOCALHOST, narrate)
    info = await hive.start_worker(request)
    hives.note_started(info)
    return info


async def until_ready(hives: Hives, jobs: Jobs, request: StartWorker, emit: Emit) -> None:
    """Start a worker and tell how it goes on: narrations, then its `WorkerInfo` or an error.

    The worker stays when the reader goes.
    """
    send, receive = trio.open_memory_channel[Narration](BUFFER)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tell, receive, emit)
        async with send:
            last = await _last(hives, jobs, request, partial(_narrate, send))
    await emit(sse.encode(last))


async def _last(
    hives: Hives, jobs: Jobs, request: StartWorker, narrate: Narrate
) -> WorkerInfo | Error:
    with hives.narrations.subscribe() as narrations:
        try:
            info = await ask(hives, request, narrate)
            text = f"{info.worker_id} for {shown(request.model)}"
            narrate(Narration("queen", "start", text))
            return await jobs.until_ready(info.worker_id, narrations, narrate)
        except RbeeError as error:
            return Error(error.code, error.message, error.hint)


def _narrate(send: trio.MemorySendChannel[Narration], narration: Narration) -> None:
    try:
        send.send_nowait(narration)
    except (trio.WouldBlock, trio.BrokenResourceError):  # who does not keep up loses some
        return


async def _tell(receive: trio.MemoryReceiveChannel[Narration], emit: Emit) -> None:
    async with receive:
        async for narration in receive:
            await emit(sse.encode(narration))
