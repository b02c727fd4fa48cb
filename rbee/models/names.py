"""What is on a machine's disk, by its names: asked for often, read only when it has changed."""

from __future__ import annotations

import time
from pathlib import Path

from rbee.models.catalog import Catalog

SETTLED = 2.0  # seconds: a change within a clock's tick of the last one leaves the same time


class CatalogNames:
    """The names of the models of one directory. Every call blocks on the disk."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._seen: int | None = None
        self._names: tuple[str, ...] = ()

    def read(self) -> tuple[str, ...]:
        """Return every reference of each model that is whole as far as sizes tell.

        Records are written and removed as files of the directory, which has the time of that.
        """
        stamp = self._stamp()
        if stamp is None or stamp != self._seen:
            self._names = _names(self._models)
            is_settled = stamp is not None and stamp < time.time_ns() - SETTLED * 1e9
            self._seen = stamp if is_settled else None
        return self._names

    def _stamp(self) -> int | None:
        try:
            return self._models.stat().st_mtime_ns
        except OSError:
            return None


def _names(models: Path) -> tuple[str, ...]:
    try:
        items = Catalog(models).items()
    except OSError:  # somebody is just removing it
        return ()
    entries = [item.entry for item in items if item.entry and not item.damage]
    return tuple(sorted({name for entry in entries for name in entry.references}))
