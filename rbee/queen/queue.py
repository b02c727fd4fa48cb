"""Who waits, and who is next: first come, first served within a priority.

Pure: it knows neither workers nor tasks. A request that nothing is found for keeps only those back
that want the very same; so one that insists on a busy node delays no other.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

import attrs

W = TypeVar("W")


@attrs.frozen(order=True)
class Rank:
    """A place in the order: a lower priority is earlier, as vLLM has it, then a lower number."""

    priority: int
    number: int


class Waiting(Protocol):
    """What waits.

    Attributes:
        rank: nobody else's.
        model: what is counted together.
        kind: what is the same for all that the same workers can serve.
    """

    @property
    def rank(self) -> Rank: ...

    @property
    def model(self) -> Hashable: ...

    @property
    def kind(self) -> Hashable: ...


T = TypeVar("T", bound=Waiting)
_RANK = attrgetter("rank")


class Queue(Generic[T]):
    """All that wait, in their order."""

    def __init__(self) -> None:
        self._waiting: list[T] = []
        self._models: Counter[Hashable] = Counter()
        self._kinds: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def count(self, model: Hashable) -> int:
        """Return how many wait for a model."""
        return self._models[model]

    def join(self, one: T) -> None:
        insort(self._waiting, one, key=_RANK)
        self._models[one.model] += 1
        self._kinds[one.kind] += 1

    def leave(self, one: T) -> None:
        """Take one out, if it is there."""
        at = bisect_left(self._waiting, one.rank, key=_RANK)
        if at < len(self._waiting) and self._waiting[at] is one:
            del self._waiting[at]
            _count_down(self._models, one.model)
            _count_down(self._kinds, one.kind)

    def serve(self, find: Callable[[T], W | None]) -> Iterator[tuple[T, W]]:
        """Take out, one after the other, those that ``find`` has something for, with that."""
        nothing_for: set[Hashable] = set()
        for one in list(self._waiting):
            if len(nothing_for) == len(self._kinds):
                return
            if one.kind in nothing_for:
                continue
            found = find(one)
            if found is None:
                nothing_for.add(one.kind)
            else:
                self.leave(one)
                yield one, found

    def positions(self) -> Iterator[tuple[T, int]]:
        """Return each with how many are before it that wait for the same model."""
        before: Counter[Hashable] = Counter()
        for one in self._waiting:
            yield one, before[one.model]
            before[one.model] += 1


def _count_down(counts: Counter[Hashable], key: Hashable) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
