"""Room for one more model: what is free, what is promised, and who goes for it.

Only workers that nobody uses go, the least recently used first, and none that was told to stay for
ever, or that has just become ready and waits for who it was started for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import attrs
import trio

from rbee.model import WorkerState
from rbee.models.footprint import MemoryPlan
from rbee.models.memory import Local
from rbee.units import human
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
    def __call__(self, plan: MemoryPlan, available: int, *, model: str, bound: str) -> None: ...


@attrs.frozen
class Memory:
    """How a hive counts memory (`rbee.models.memory`).

    Attributes:
        plan: what a worker would take; None for nothing worth counting.
        free: bytes free for a backend and its devices now; None where nobody knows.
        check: raises `InsufficientError` unless a plan fits into so many bytes.
        budget: bytes that this hive's workers on the CPU may take in all; None for no bound.
    """

    plan: Callable[[Local, StartWorker], Awaitable[MemoryPlan | None]]
    free: Callable[[str, str], Awaitable[int | None]]
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

    async def make(self, plan: MemoryPlan, newcomer: Tenant, narrate: Narrate) -> None:
        """Return once there is room for ``plan``; the caller gives it the newcomer at once.

        Nothing is awaited between the last look and the return: what one start counts on, the
        others see as promised.

        Raises:
            InsufficientError: there is not, even if everybody who may go went.
        """
        with trio.move_on_after(WAIT):
            return await self._make(plan, newcomer, narrate)
        self._refuse(plan, newcomer, await self._available(newcomer))
        raise AssertionError("what does not fit is refused")

    async def _make(self, plan: MemoryPlan, newcomer: Tenant, narrate: Narrate) -> None:
        told = False
        while plan.required > (available := await self._available(newcomer)):
            at_most = available + self._to_be_had(newcomer)
            if plan.required > at_most:
                self._refuse(plan, newcomer, at_most)
            await self._refresh()
            if await self._unload_one(newcomer, narrate):
                continue
            if not told:
                narrate("wait", "the memory that is needed is in use")
            told = True
            await trio.sleep(AGAIN)

    async def _unload_one(self, newcomer: Tenant, narrate: Narrate) -> bool:
        """Unload the least recently used one that nobody uses; False if there is none."""
        idle = [one for one in self._others(newcomer) if _may_go(one) and one.idle > 0]
        for victim in sorted(idle, key=lambda one: -one.idle):
            narrate("unload", f"what was not used for {victim.idle:.0f} s: memory is needed")
            if await self._unload(victim):
                return True
        return False

    def _refuse(self, plan: MemoryPlan, newcomer: Tenant, available: float) -> None:
        bound = ""
        if self._memory.budget is not None and newcomer.backend == "cpu":
            bound = f" (the hive's workers may take {human(self._memory.budget)}: [hive] memory)"
        self._memory.check(plan, max(0, int(available)), model=newcomer.name, bound=bound)

    async def _available(self, newcomer: Tenant) -> float:
        """Return the bytes for a newcomer now, less what was promised to those who load."""
        free = await self._memory.free(newcomer.backend, newcomer.device)
        available = float("inf")
        if free is not None:
            available = free - sum(map(_planned, filter(_loads, self._others(newcomer))))
        if self._memory.budget is not None and newcomer.backend == "cpu":
            taken = sum(map(_planned, self._others(newcomer)))
            available = min(available, self._memory.budget - taken)
        return available

    def _to_be_had(self, newcomer: Tenant) -> float:
        """Return the bytes that may come back: of those who go, or may when they are idle."""
        others = self._others(newcomer)
        return sum(_planned(one) for one in others if _may_go(one) or _loads(one) or _goes(one))

    def _others(self, newcomer: Tenant) -> list[Tenant]:
        return [one for one in self._tenants() if one is not newcomer and shares(one, newcomer)]


def _planned(one: Tenant) -> int:
    return one.plan.required if one.plan is not None else 0


def shares(one: Tenant, other: Tenant) -> bool:
    """Tell whether two workers take the same memory."""
    if one.backend != other.backend:
        return False
    return one.backend == "cpu" or bool({*one.device.split(",")} & {*other.device.split(",")})


def _loads(one: Tenant) -> bool:
    return one.state in (WorkerState.STARTED, WorkerState.LOADING)


def _goes(one: Tenant) -> bool:
    return one.state not in (WorkerState.READY, WorkerState.UNRESPONSIVE) and not _loads(one)


def _may_go(one: Tenant) -> bool:
    """Tell whether a worker goes for another as soon as nobody uses it."""
    return one.plan is not None and one.state is WorkerState.READY and not one.is_pinned
