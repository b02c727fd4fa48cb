"""A keyed registry that can be waited for; it holds no tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import trio

K = TypeVar("K")
V = TypeVar("V")


class Registry(Generic[K, V]):
    """Values by key; `wait_until` sees every change because it looks after each one."""

    def __init__(self) -> None:
        self._values: dict[K, V] = {}
        self._changed = trio.Event()
        self._listeners: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[V]:
        return iter(list(self._values.values()))

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        return self._values.get(key)

    def set(self, key: K, value: V) -> None:
        self._values[key] = value
        self._wake()

    def remove(self, key: K) -> None:
        """Remove a value if it is there; who waits looks again in any case.

        What he looks at may be more than this registry: why a value went, say.
        """
        self._values.pop(key, None)
        self._wake()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after every change, before anybody who waits runs."""
        self._listeners.append(listener)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
        for listener in self._listeners:
            listener()

    async def wait_until(self, found: Callable[[], V | None]) -> V:
        """Return ``found()`` as soon as it is not None, looking again after every change."""
        while (value := found()) is None:
            await self._changed.wait()
        return value
