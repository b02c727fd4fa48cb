"""The slots of the workers: how many requests each is at, and who gets the next one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Container, Iterable

from rbee.wire.messages import WorkerInfo

Capacity = Callable[[WorkerInfo], float]
"""How many requests a worker gets at once."""


class Slots:
    """Counts the requests of one queen exactly; those of others at its workers it cannot see."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._at: Counter[str] = Counter()
        self._last: dict[str, int] = {}
        self._takes = itertools.count(1)

    def taken(self, worker: WorkerInfo) -> int:
        return self._at[worker.worker_id]

    def total(self) -> int:
        """Return how many are taken of all workers."""
        return sum(self._at.values())

    def take(self, worker: WorkerInfo) -> None:
        self._at[worker.worker_id] += 1
        self._last[worker.worker_id] = next(self._takes)

    def free(self, worker: WorkerInfo) -> None:
        self._at[worker.worker_id] -= 1
        if not self._at[worker.worker_id]:
            del self._at[worker.worker_id]

    def has_room(self, worker: WorkerInfo) -> bool:
        return self._at[worker.worker_id] < self._capacity(worker)

    def least(self, workers: Iterable[WorkerInfo]) -> WorkerInfo | None:
        """Choose the worker with the fewest requests; of several the one longest not chosen."""
        return min(workers, key=self._order, default=None)

    def forget_others(self, living: Container[str]) -> None:
        """Forget when workers that have gone were chosen."""
        self._last = {one: last for one, last in self._last.items() if one in living}

    def _order(self, worker: WorkerInfo) -> tuple[int, int]:
        name = worker.worker_id
        return self._at[name], self._last.get(name, 0)
