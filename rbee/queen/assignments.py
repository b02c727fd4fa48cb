"""Assignments: for each request the worker that does it, started if there is none."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import attrs
import trio

from rbee.errors import (
    BadInputError,
    ChildExitedError,
    RbeeError,
    UnavailableError,
    from_wire,
)
from rbee.hints import logs_of
from rbee.model import DEFAULT_ENGINE, LOCALHOST, WorkerId, WorkerState
from rbee.models.reference import shown
from rbee.queen.aliases import Aliases
from rbee.queen.attempts import Narrate
from rbee.queen.backoff import Backoff
from rbee.queen.hive import Hive
from rbee.queen.hives import Hives
from rbee.queen.limits import Limits
from rbee.queen.metrics import Figures
from rbee.queen.placement import choose, is_called, start_for
from rbee.queen.places import Places
from rbee.queen.turns import Turns
from rbee.queen.waiting_room import Asked, Claim, Terms, WaitingRoom
from rbee.queen.where import located
from rbee.remains import LEFT
from rbee.scopes import open_service
from rbee.wire.messages import Narration, StartWorker, TaskRequest, WorkerInfo, WorkerNarration

log = logging.getLogger(__name__)
T = TypeVar("T")

LOG_LINES = 12
TOLD_WITHIN = 1.0  # seconds for the news of a worker's end


class Assignments:
    """Finds the workers of one queen for its requests, and has those wait that find none free."""

    def __init__(
        self, hives: Hives, places: Places, aliases: Aliases, limits: Limits | None = None
    ) -> None:
        self._hives = hives
        self._places = places
        self._aliases = aliases
        self._limits = limits or Limits()
        self._turns = Turns()
        self._backoff = Backoff()
        self.figures = Figures()
        self.room = WaitingRoom(hives.workers, aliases.meanings, self._capacity, self._limits)

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        """Tell those that wait how their turn comes nearer, while the body runs."""
        async with open_service(self.room.keep_telling):
            yield

    def claim(self, asked: Asked, terms: Terms) -> Claim:
        """Make a request's claim to a worker: from now on it has its place among the others."""
        return self.room.claim(asked, terms)

    def open_slot(self, claim: Claim, narrate: Narrate) -> OpenSlot:
        """Have a slot of a worker that is ready, started if there is none, while the body runs.

        Raises:
            QueueFullError: too many wait for one already.
            RbeeError: why there will be none.
        """
        return OpenSlot(self, claim, narrate)

    async def _take_slot(self, claim: Claim, narrate: Narrate) -> WorkerInfo:
        try:
            if not self.room.take(claim):
                with self.room.waiting(claim) as served:
                    await self._wait_served(claim, served, narrate)
        except BaseException:
            self.room.give_back(claim)
            raise
        assert claim.worker is not None
        return claim.worker

    async def _wait_served(self, claim: Claim, served: trio.CancelScope, narrate: Narrate) -> None:
        """Wait for its turn, and see to it that there is a worker which that can come from."""
        try:
            with served:
                while True:
                    await self.worker_for(claim.asked, narrate)
                    await self.room.wait_deserted(claim.asked)
        except RbeeError:
            if claim.worker is None:  # its turn may have come at the same moment
                raise

    def _capacity(self, worker: WorkerInfo) -> float:
        said = self._aliases.slots_of((worker.model, *worker.served_names)) or self._limits.slots
        return said or worker.slots or float("inf")

    async def worker_for(self, request: Asked, narrate: Narrate) -> WorkerInfo:
        """Return a ready worker, if a busy one, started if there is none.

        Raises:
            RbeeError: why there is none.
        """
        if (ready := self.ready_for(request)) is not None:
            return ready
        return await self._wait_for_worker(request, narrate)

    def ready_for(self, request: Asked) -> WorkerInfo | None:
        """Return a worker that is ready now, if a busy one."""
        found = self._choose(request)
        is_ready = found is not None and found.state == WorkerState.READY.value
        return found if is_ready else None

    def served(self, model: str) -> WorkerInfo | None:
        """Return any worker that serves a name, for who does not care how."""
        names = self._aliases.meanings(model)
        return next((one for one in self._hives.workers if is_called(one, names)), None)

    def hive_of(self, worker: WorkerInfo) -> Hive:
        """Return the hive of a worker.

        Raises:
            UnavailableError: its node is lost.
        """
        hive = self._hives.running(worker.node)
        if hive is None:
            raise UnavailableError(f"the hive on {worker.node} is gone", code="hive_lost")
        return hive

    def waiting(self) -> int:
        """Return how many requests wait for a worker."""
        return len(self.room)

    def is_forwarded(self, worker: WorkerInfo) -> bool:
        """Tell whether its node's connections are taken by a forward, whatever is behind it."""
        hive = self._hives.running(worker.node)
        return hive is not None and hive.way_to(worker.url) != worker.url

    def note_absent(self, worker: WorkerInfo, error: RbeeError) -> None:
        """Use a worker no more that is not where it was: another may have its port by now."""
        log.info("worker %s is not there: %s", worker.worker_id, error)
        current = self._hives.workers.get(WorkerId(worker.worker_id))
        if current is not None:  # its hive tells what has become of it
            self._hives.take_info(attrs.evolve(current, state=WorkerState.STOPPING.value))

    async def lost(self, worker: WorkerInfo, *, has_begun: bool) -> RbeeError:
        """Make the error of a request whose worker's node is lost: another may get it at first."""
        if has_begun:
            return await self.broken(worker)
        return UnavailableError(f"the hive on {worker.node} is gone", code="hive_lost")

    async def broken(self, worker: WorkerInfo) -> RbeeError:
        """Make the error of an answer that broke off, with the worker's own end if it is told."""
        error: RbeeError = ChildExitedError(
            f"worker {worker.worker_id} on {worker.node} ended in the middle of the answer",
            code="worker_died",
            hint=logs_of(worker.worker_id, worker.node),
        )
        with trio.move_on_after(TOLD_WITHIN):
            ended = await self._hives.workers.wait_until(lambda: self._over(worker.worker_id))
            error.message += f": {_failure(ended).message}"
        return error

    def _over(self, worker_id: str) -> WorkerInfo | None:
        worker = self._hives.workers.get(WorkerId(worker_id))
        if worker is not None:
            return worker if worker.state in LEFT else None
        return self._hives.failures.get(worker_id)

    # finding one ------------------------------------------------------------------------------
    async def _wait_for_worker(self, request: Asked, narrate: Narrate) -> WorkerInfo:
        start = self._aliases.spell_out(self._start_for(request))
        with self._hives.narrations.subscribe() as narrations:
            worker = await self._have_worker(request, start, narrate)
            try:
                return await self.until_ready(worker.worker_id, narrations, narrate)
            except RbeeError as exc:
                self._backoff.note_failure(start, worker.worker_id, exc)
                raise
            finally:
                if self._is_ready(worker.worker_id):
                    self._backoff.note_success(start)

    def _start_for(self, request: Asked) -> StartWorker:
        if isinstance(request, TaskRequest):
            return start_for(request, self._hives.queen_id)
        engine = request.engine or DEFAULT_ENGINE
        return attrs.evolve(request, owner=self._hives.queen_id, engine=engine)

    async def _have_worker(
        self, request: Asked, start: StartWorker, narrate: Narrate
    ) -> WorkerInfo:
        """Return a worker that is on its way at least."""
        names = {(start.node, name) for name in self._aliases.meanings(start.model)}
        asked = trio.current_time()
        async with self._turns.take(names):  # two requests for one model are one start
            return self._choose(request) or await self._start(request, start, asked, narrate)

    def _choose(self, request: Asked) -> WorkerInfo | None:
        return choose(self._hives.workers, request, self._aliases.meanings)

    async def _start(
        self, request: Asked, start: StartWorker, asked: float, narrate: Narrate
    ) -> WorkerInfo:
        self._backoff.check(start)

        async def begin(hive: Hive) -> WorkerInfo:
            async with hive.starting:  # the node may have been asked for by name as well
                there = attrs.evolve(request, node=hive.info.node)
                return self._choose(there) or await self._start_on(hive, start, narrate)

        return await self._places.start(start, narrate, begin, since=asked)

    async def _start_on(self, hive: Hive, start: StartWorker, narrate: Narrate) -> WorkerInfo:
        where = "" if hive.info.node == LOCALHOST else f" on {hive.info.node}"
        narrate(Narration("queen", "start", f"a worker for {shown(start.model)}{where}"))
        worker = await hive.start_worker(start)
        self._hives.note_started(worker)
        return worker

    async def until_ready(
        self,
        worker_id: str,
        narrations: trio.MemoryReceiveChannel[WorkerNarration],
        narrate: Narrate,
    ) -> WorkerInfo:
        """Wait for a worker, telling how it goes on; raise why it did not become ready."""
        began = trio.current_time()

        def forward(item: WorkerNarration) -> None:
            if item.worker_id == worker_id:
                narrate(Narration(item.actor, item.action, item.text, item.share))

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_for_each, narrations, forward)
                worker = await self._hives.workers.wait_until(lambda: self._settled(worker_id))
                nursery.cancel_scope.cancel(reason="worker settled")
        finally:  # a request whose turn comes with the worker waits no more, but is told as well
            with suppress(trio.WouldBlock, trio.EndOfChannel):
                while True:  # what was told before it settled
                    forward(narrations.receive_nowait())
            if self._is_ready(worker_id):
                narrate(Narration("queen", "ready", f"after {trio.current_time() - began:.1f} s"))
        if worker.state != WorkerState.READY.value:
            raise located(_failure(worker), worker.node)
        return worker

    def _is_ready(self, worker_id: str) -> bool:
        worker = self._hives.workers.get(WorkerId(worker_id))
        return worker is not None and worker.state == WorkerState.READY.value

    def _settled(self, worker_id: str) -> WorkerInfo | None:
        worker = self._hives.workers.get(WorkerId(worker_id))
        if worker is None:
            return self._hives.failures.get(worker_id)
        return worker if worker.state in (WorkerState.READY.value, *LEFT) else None


class OpenSlot:
    """A slot that a claim has while the body runs (`Assignments.open_slot`)."""

    __slots__ = ("_assignments", "_claim", "_narrate")

    def __init__(self, assignments: Assignments, claim: Claim, narrate: Narrate) -> None:
        self._assignments = assignments
        self._claim = claim
        self._narrate = narrate

    async def __aenter__(self) -> WorkerInfo:
        return await self._assignments._take_slot(self._claim, self._narrate)

    async def __aexit__(self, *_: object) -> None:
        self._assignments.room.give_back(self._claim)


async def _for_each(items: trio.MemoryReceiveChannel[T], take: Callable[[T], None]) -> None:
    async for item in items:
        take(item)


def _failure(worker: WorkerInfo) -> RbeeError:
    """Make the error of a worker that did not become ready, with the end of its log."""
    detail = worker.error
    if detail is None:
        return UnavailableError(f"worker {worker.worker_id} was stopped", code="worker_stopped")
    message = detail.message
    lines = str(detail.details.get("log", "")).splitlines()[-LOG_LINES:]
    if lines and detail.code != BadInputError.code:
        message += "\nthe end of its log:\n  " + "\n  ".join(lines)
    hint = detail.hint or logs_of(worker.worker_id, worker.node)
    return from_wire(detail.code, message, hint=hint, details=detail.details)
