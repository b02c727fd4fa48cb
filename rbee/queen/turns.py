"""Turns: one at a time for everything that goes by a common name."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Hashable
from contextlib import asynccontextmanager

import attrs
import trio


@attrs.define(eq=False)
class _Turn:
    names: frozenset[Hashable]
    over: trio.Event = attrs.field(factory=trio.Event)


class Turns:
    """Who takes a turn waits for those that share a name with it; the others do not wait."""

    def __init__(self) -> None:
        self._taken: list[_Turn] = []

    @asynccontextmanager
    async def take(self, names: Collection[Hashable]) -> AsyncGenerator[None, None]:
        while (other := self._in_the_way(names)) is not None:
            await other.over.wait()
        turn = _Turn(frozenset(names))
        self._taken.append(turn)
        try:
            yield
        finally:
            self._taken.remove(turn)
            turn.over.set()

    def _in_the_way(self, names: Collection[Hashable]) -> _Turn | None:
        return next((turn for turn in self._taken if not turn.names.isdisjoint(names)), None)
