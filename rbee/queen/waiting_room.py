"""The waiting room: a request gets a worker's slot, at once or when its turn comes.

Whenever a slot is freed or a worker comes, those that wait are served in their order, right then
and by whoever brought the news; so a slot that is free is one that nobody waits for, and a newcomer
who finds one jumps no queue.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import trio

from rbee.errors import QueueFullError
from rbee.model import WorkerState
from rbee.models.reference import shown
from rbee.queen.limits import Limits
from rbee.queen.placement import Meanings, fits, kind_of
from rbee.queen.queue import Queue, Rank
from rbee.queen.sessions import Sessions
from rbee.queen.slots import Capacity, Slots
from rbee.registry import Registry
from rbee.units import human
from rbee.web.router import MAX_BODY
from rbee.wire.messages import StartWorker, TaskRequest, WorkerInfo

TELL = 0.25  # seconds between two words about a request's position
READY = WorkerState.READY.value
READ = 1024  # requests whose bodies may be on their way at once

Asked = TaskRequest | StartWorker
"""What a worker is wanted for; a `StartWorker` is the one to start if there is none."""


def _ignore(position: int) -> None:
    pass


@attrs.frozen
class Terms:
    """How a request stands among the others.

    Attributes:
        priority: a lower one is served earlier, 0 is usual.
        session: what else belongs to the same goes to the same worker while that has room.
        tell: takes how many are before it, whenever that changes.
        takes_slot: whether it is work for the engine.
        size: bytes that its body holds while it waits.
    """

    priority: int = 0
    session: str = ""
    tell: Callable[[int], None] = _ignore
    takes_slot: bool = True
    size: int = 0


@attrs.define(eq=False)
class Claim:
    """A request that wants a worker; it keeps its rank when that worker is gone.

    Attributes:
        worker: whose slot it has.
        served: of one that waits: cancelled when it gets one.
        is_known: whether it has been let in already.
        told: how many were before it, as it was told last.
    """

    asked: Asked
    terms: Terms
    rank: Rank
    model: str
    worker: WorkerInfo | None = None
    served: trio.CancelScope | None = None
    is_known: bool = False
    told: int = 0
    _kind: Hashable = None

    @property
    def kind(self) -> Hashable:
        if self._kind is None:
            self._kind = kind_of(self.asked), self.terms.takes_slot
        return self._kind

    def tell(self, position: int) -> None:
        if position != self.told:
            self.told = position
            self.terms.tell(position)


class WaitingRoom:
    """The slots of one queen's workers, and those that wait for one."""

    def __init__(
        self,
        workers: Registry[Any, WorkerInfo],
        meanings: Meanings,
        capacity: Capacity,
        limits: Limits,
    ) -> None:
        self.slots = Slots(capacity)
        self._workers = workers
        self._meanings = meanings
        self._limits = limits
        self._queue: Queue[Claim] = Queue()
        self._sessions = Sessions()
        self._number = 0
        self._read = 0
        self._read_size = 0  # bytes of those bodies that have come
        self._held = 0  # bytes of the bodies of those in the queue
        self._ready: frozenset[str] = frozenset()
        self._fewer = trio.Event()  # ready workers
        self._moved = trio.Event()
        workers.listen(self._note_change)

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._queue)

    def claim(self, asked: Asked, terms: Terms) -> Claim:
        self._number += 1
        return Claim(asked, terms, Rank(terms.priority, self._number), self._counted_as(asked))

    def _counted_as(self, asked: Asked) -> str:
        """Return one name for all that mean the same model."""
        names = [name for name in self._meanings(asked.model) if ":" in name]
        return min(names) if names else asked.model

    @contextmanager
    def reading(self) -> Iterator[Callable[[int], None]]:
        """Count a request while its body is read, which is not begun if too many wait.

        Yields what takes each number of bytes that have come, and raises as this does.

        Raises:
            QueueFullError: too many do, or too much is being read.
        """
        if len(self._queue) >= self._limits.waiting or self._read >= READ:
            raise full(len(self._queue) + self._read)
        size = 0

        def take(more: int) -> None:
            nonlocal size
            self._check_reading(more)
            size += more
            self._read_size += more

        self._read += 1
        try:
            yield take
        finally:
            self._read -= 1
            self._read_size -= size

    def _check_reading(self, more: int) -> None:
        bound = max(self._limits.waiting_size, MAX_BODY)  # one alone always may
        if self._read_size + more > bound:
            raise QueueFullError(
                f"the requests that are being read hold {human(self._read_size)}; "
                f"no more than {human(bound)} can",
                hint="rbee-keeper worker list",
            )

    # taking and leaving ----------------------------------------------------------------------
    def take(self, claim: Claim) -> bool:
        """Take a slot that is free, of which nobody in the queue could make use."""
        if self._queue:  # config.toml may have changed what there is
            self._serve()
        claim.worker = self._find(claim)
        claim.is_known |= claim.worker is not None
        return claim.worker is not None

    @contextmanager
    def waiting(self, claim: Claim) -> Iterator[trio.CancelScope]:
        """Be in the queue while the body runs, unless served, which cancels the scope it gets.

        Raises:
            QueueFullError: too many are.
        """
        if not claim.is_known:
            self._check_room(claim)
        claim.is_known = True
        claim.served = served = trio.CancelScope()
        self._queue.join(claim)
        self._held += claim.terms.size
        self._tell_first_position(claim)
        try:
            yield served
        finally:
            self._queue.leave(claim)
            self._held -= claim.terms.size
            self._moved.set()

    def give_back(self, claim: Claim) -> None:
        """Free a claim's slot, for the first of those that can use it."""
        if claim.worker is not None:
            worker, claim.worker = claim.worker, None
            if claim.terms.takes_slot:
                self.slots.free(worker)
                self._serve()

    def _check_room(self, claim: Claim) -> None:
        if len(self._queue) >= self._limits.waiting:
            raise full(len(self._queue))
        if self._held + claim.terms.size > self._limits.waiting_size:
            raise QueueFullError(
                f"the requests that wait hold {human(self._held)}; "
                f"no more than {human(self._limits.waiting_size)} can",
                hint="rbee-keeper worker list",
            )
        if self._queue.count(claim.model) >= self._limits.waiting_per_model:
            raise QueueFullError(
                f"{self._limits.waiting_per_model} requests wait for {shown(claim.asked.model)}; "
                "no more can",
                hint="rbee-keeper worker list",
            )

    # serving ---------------------------------------------------------------------------------
    def _serve(self) -> None:
        for claim, worker in self._queue.serve(self._find):
            claim.worker = worker
            assert claim.served is not None
            claim.served.cancel(reason="its turn has come")
            self._moved.set()

    def _find(self, claim: Claim) -> WorkerInfo | None:
        """Take a slot for a claim, if a worker that fits has one."""
        fitting = [one for one in self._workers if self._is_ready_for(one, claim.asked)]
        if not claim.terms.takes_slot:
            return self.slots.least(fitting)
        free = list(filter(self.slots.has_room, fitting))
        session = claim.terms.session
        found = self._sessions.find(claim.model, session, free) or self.slots.least(free)
        if found is not None:
            self.slots.take(found)
            self._sessions.note(claim.model, session, found)
        return found

    def _is_ready_for(self, worker: WorkerInfo, asked: Asked) -> bool:
        return worker.state == READY and fits(worker, asked, self._meanings)

    def _note_change(self) -> None:
        """Look again after something has happened to a worker."""
        ready = frozenset(one.worker_id for one in self._workers if one.state == READY)
        if not self._ready <= ready:
            self._fewer.set()
            self._fewer = trio.Event()
            self.slots.forget_others(ready)
        self._ready = ready
        if self._queue:
            self._serve()

    # waiting ---------------------------------------------------------------------------------
    def has_ready(self, asked: Asked) -> bool:
        """Tell whether a worker would serve it that is ready, if busy."""
        return any(self._is_ready_for(one, asked) for one in self._workers)

    async def wait_deserted(self, asked: Asked) -> None:
        """Return when no worker that is ready would serve it any more."""
        while self.has_ready(asked):
            await self._fewer.wait()

    def _tell_first_position(self, claim: Claim) -> None:
        if claim.terms.tell is not _ignore:
            claim.tell(dict(self._queue.positions())[claim])

    async def keep_telling(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Tell those that wait how many are before them, as it changes."""
        task_status.started()
        while True:
            await self._moved.wait()
            self._moved = trio.Event()
            for claim, position in self._queue.positions():
                claim.tell(position)
            await trio.sleep(TELL)


def full(waiting: int) -> QueueFullError:
    return QueueFullError(
        f"{waiting} requests wait already; no more can", hint="rbee-keeper worker list"
    )
