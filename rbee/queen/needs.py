"""What memory a worker would take, where this machine has the model to count it from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import attrs
import trio

from rbee.errors import RbeeError
from rbee.home import Home
from rbee.models.catalog import GGUF, Catalog
from rbee.models.memory import plan_memory
from rbee.queen.placement import Meanings
from rbee.wire.messages import StartWorker

LOOK = 2.0  # seconds for the disk to answer

Needed = Callable[[StartWorker], Awaitable[int | None]]
"""Tell the bytes that a worker would take; None where nobody knows."""


@attrs.frozen
class _Place:
    directory: Path


def counting(home: Home, meanings: Meanings) -> Needed:
    """Make the function that counts them from what is on this machine's disk."""
    looking = trio.CapacityLimiter(1)  # a home on a dead NFS holds one thread, not all

    async def needed(request: StartWorker) -> int | None:
        count = partial(memory_needed, home, request, meanings(request.model))
        with trio.move_on_after(LOOK):
            return await trio.to_thread.run_sync(count, abandon_on_cancel=True, limiter=looking)
        return None

    return needed


def memory_needed(home: Home, request: StartWorker, names: Collection[str]) -> int | None:
    """Return the bytes on all devices together; None where nobody knows. Blocks on the disk.

    It is counted as for this machine; another one may compute in another dtype.
    """
    for place in _places(home, names):
        try:
            plan = plan_memory(place, request)
        except (RbeeError, OSError, ArithmeticError, ValueError, RecursionError):
            continue  # whoever starts the worker will say what is wrong
        return plan.required * plan.devices
    return None


def _places(home: Home, names: Collection[str]) -> Iterator[_Place]:
    """Find the directories of this machine that a worker could load for one of the names."""
    catalog = Catalog(home.models)
    for name in sorted(names):
        path = Path(unquote(name.removeprefix("file://")))
        if path.is_absolute():
            yield _Place(path)
        else:
            items = catalog.find(name)
            yield from (
                _Place(one.directory)
                for one in items
                if one.entry and one.entry.dtype != GGUF and not one.damage
            )
