"""A model for a worker: found, and then kept on the disk for as long as the worker has it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from rbee.errors import ConflictError
from rbee.models.catalog import Catalog
from rbee.models.use import share

FINDS = 3


class _Found(Protocol):
    @property
    def directory(self) -> Path: ...


M = TypeVar("M", bound=_Found)


async def take_into_use(
    find: Callable[[], Awaitable[M | None]], models: Path, held: ExitStack
) -> M | None:
    """Find a model and keep it from being removed until ``held`` closes.

    ``find`` is asked again if somebody removed or replaced what it had found. A model outside of
    ``models`` is its owner's to keep.

    Raises:
        ConflictError: it was removed again and again.
    """
    name = ""
    for _ in range(FINDS):
        model = await find()
        if model is None or model.directory.parent != models:
            return model
        name = model.directory.name
        with ExitStack() as tentative:
            await share(models, name, tentative)
            if await trio.to_thread.run_sync(_note_use, model.directory, tentative):
                held.push(tentative.pop_all())
                return model
    raise ConflictError(
        f"{name} was removed while a worker was about to use it",
        code="model_busy",
        hint="rbee-keeper model list",
    )


def _note_use(directory: Path, held: ExitStack) -> bool:
    """Tell whether the record is still good; remember when its use begins and ends."""
    catalog = Catalog(directory.parent)
    item = catalog.read(directory.name)
    if item.damage:
        return False
    catalog.touch(item)
    held.callback(catalog.touch, item)
    return True
