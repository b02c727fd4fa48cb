"""Workers that somebody asks for by name, not by a job: asked for, and told of until ready."""

from __future__ import annotations

from rbee.model import LOCALHOST
from rbee.models.reference import shown
from rbee.queen.hives import Hives
from rbee.queen.jobs import Jobs
from rbee.web.narrated import Tell
from rbee.wire.messages import Narration, StartWorker, WorkerInfo


async def ask(hives: Hives, request: StartWorker, tell: Tell) -> WorkerInfo:
    """Have a hive start a worker; it is on its way when this returns."""
    hive = await hives.get(request.node or LOCALHOST, tell)
    info = await hive.start_worker(request)
    hives.note_started(info)
    return info


async def until_ready(hives: Hives, jobs: Jobs, request: StartWorker, tell: Tell) -> WorkerInfo:
    """Start a worker and return when it is ready; cancelling leaves it on its way.

    Raises:
        RbeeError: why it did not become ready.
    """
    with hives.narrations.subscribe() as narrations:
        info = await ask(hives, request, tell)
        tell(Narration("queen", "start", f"{info.worker_id} for {shown(request.model)}"))
        return await jobs.until_ready(info.worker_id, narrations, tell)
