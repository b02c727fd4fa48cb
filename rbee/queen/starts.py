"""Workers that somebody asks for by name, not by a job: asked for, and told of until ready."""

from __future__ import annotations

import attrs

from rbee.models.reference import shown
from rbee.queen.assignments import Assignments
from rbee.queen.hive import Hive
from rbee.queen.hives import Hives
from rbee.queen.places import Places
from rbee.web.narrated import Tell
from rbee.wire.messages import Narration, NodeChoice, StartWorker, WorkerInfo


@attrs.frozen
class Starts:
    """What a queen does for those who want a worker."""

    hives: Hives
    places: Places
    assignments: Assignments

    async def ask(self, request: StartWorker, tell: Tell) -> WorkerInfo:
        """Have a hive start a worker; it is on its way when this returns."""

        async def begin(hive: Hive) -> WorkerInfo:
            info = await hive.start_worker(request)
            self.hives.note_started(info)
            return info

        return await self.places.start(request, tell, begin)

    async def until_ready(self, request: StartWorker, tell: Tell) -> WorkerInfo:
        """Start a worker and return when it is ready; cancelling leaves it on its way.

        Raises:
            RbeeError: why it did not become ready.
        """
        with self.hives.narrations.subscribe() as narrations:
            info = await self.ask(request, tell)
            tell(Narration("queen", "start", f"{info.worker_id} for {shown(request.model)}"))
            return await self.assignments.until_ready(info.worker_id, narrations, tell)

    async def explain(self, request: StartWorker) -> list[NodeChoice]:
        """Tell where it would be started, and why."""
        return await self.places.explain(request)
