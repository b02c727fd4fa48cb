"""Room for one more model: what is free, what is promised, and who goes for it.

Only workers that nobody uses go, the least recently used first, and none that was told to stay for
ever. One start at a time looks for room: two would both count on the same memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import attrs
import trio

from rbee.model import WorkerState
from rbee.models.footprint import MemoryPlan
from rbee.models.memory import Local
from rbee.wire.messages import StartWorker

AGAIN = 0.25  # seconds between two looks while busy or loading workers hold the memory
WAIT = 60.0  # seconds to wait for them

Narrate = Callable[[str, str], None]


class Tenant(Protocol):
    """A worker as far as room is concerned.

    ``device`` and ``backend`` say whose memory it takes; ``plan`` is None before it has its room,
    and for engines without a model.
    """

    @property
    def name(self) -> str: ...
    @property
    def plan(self) -> MemoryPlan | None: ...
    @property
    def state(self) -> WorkerState: ...
    @property
    def backend(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def is_pinned(self) -> bool: ...
    @property
    def idle(self) -> float: ...


class Check(Protocol):
    def __call__(self, plan: MemoryPlan, available: int, *, what: str) -> None: ...


@attrs.frozen
class Memory:
    """How a hive counts memory (`rbee.models.memory`).

    Attributes:
        plan: what a worker would take; None for nothing worth counting.
        free: bytes free for a backend and its devices now; None where nobody knows.
        check: raises `InsufficientError` unless a plan fits into so many bytes; ``what`` names it.
        budget: bytes that this hive's workers on the CPU may take in all; None for no bound.
    """

    plan: Callable[[Local, StartWorker], MemoryPlan | None]
    free: Callable[[str, str], int | None]
    check: Check
    budget: int | None = None


class Room:
    """The memory of one hive's machine.

    Args:
        tenants: the workers that are there now.
        refresh: looks at all of them, so that their idle times are true.
        unload: ends one that nobody uses and returns True once its memory is back; False if it
            turned out to be at work.
    """

    def __init__(
        self,
        memory: Memory,
        tenants: Callable[[], Iterable[Tenant]],
        refresh: Callable[[], Awaitable[None]],
        unload: Callable[[Tenant], Awaitable[bool]],
    ) -> None:
        self._memory = memory
        self._tenants = tenants
        self._refresh = refresh
        self._unload = unload
        self._lock = trio.Lock()

    async def make(self, plan: MemoryPlan, newcomer: Tenant, narrate: Narrate) -> None:
        """Return once there is room for ``plan``, which the caller then gives the newcomer.

        Raises:
            InsufficientError: there is not, even if everybody who may go went.
        """
        async with self._lock:
            waited = trio.move_on_after(WAIT)
            with waited:
                await self._make(plan, newcomer, narrate)
            if waited.cancelled_caught:
                self._refuse(plan, newcomer, self._available(newcomer))

    async def _make(self, plan: MemoryPlan, newcomer: Tenant, narrate: Narrate) -> None:
        told = False
        while plan.required > self._available(newcomer):
            at_most = self._available(newcomer) + self._to_be_had(newcomer)
            if plan.required > at_most:
                self._refuse(plan, newcomer, at_most)
            await self._refresh()
            idle = [one for one in self._others(newcomer) if _may_go(one) and one.idle > 0]
            for victim in sorted(idle, key=lambda one: -one.idle):
                narrate("unload", f"what was not used for {victim.idle:.0f} s: memory is needed")
                if await self._unload(victim):
                    break
            else:
                if not told:
                    narrate("wait", "the memory that is needed is in use")
                told = True
                await trio.sleep(AGAIN)

    def _refuse(self, plan: MemoryPlan, newcomer: Tenant, available: float) -> None:
        self._memory.check(plan, max(0, int(available)), what=newcomer.name)

    def _available(self, newcomer: Tenant) -> float:
        """Return the bytes for a newcomer now, less what was promised to those who load."""
        available = float("inf")
        free = self._memory.free(newcomer.backend, newcomer.device)
        if free is not None:
            loading = [one for one in self._others(newcomer) if not _has_loaded(one)]
            available = free - sum(map(_planned, loading))
        if self._memory.budget is not None and newcomer.backend == "cpu":
            taken = sum(map(_planned, self._others(newcomer)))
            available = min(available, self._memory.budget - taken)
        return available

    def _to_be_had(self, newcomer: Tenant) -> float:
        """Return the bytes that may come back: of those who may go, now or when they are idle."""
        return sum(_planned(one) for one in self._others(newcomer) if _may_go(one) or _loads(one))

    def _others(self, newcomer: Tenant) -> list[Tenant]:
        return [one for one in self._tenants() if one is not newcomer and _shares(one, newcomer)]


def _planned(one: Tenant) -> int:
    return one.plan.required if one.plan is not None else 0


def _shares(one: Tenant, other: Tenant) -> bool:
    """Tell whether two workers take the same memory."""
    if one.backend != other.backend:
        return False
    return one.backend == "cpu" or bool({*one.device.split(",")} & {*other.device.split(",")})


def _loads(one: Tenant) -> bool:
    return one.state in (WorkerState.STARTED, WorkerState.LOADING)


def _has_loaded(one: Tenant) -> bool:
    return not _loads(one)


def _may_go(one: Tenant) -> bool:
    """Tell whether a worker goes for another as soon as nobody uses it."""
    return one.plan is not None and one.state is WorkerState.READY and not one.is_pinned
