"""What has lost its guard, in directories that others still use: with that it belongs to nobody.

The end of a guard is the end of all that is below it. Another guard that is among that, and lives,
ends what it has below itself; so that is left to it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rbee import guard
from rbee.errors import MachineError
from rbee.remains import UNVERIFIED
from rbee.sweep import Identity, Record, records


class Strays:
    """All that was ever found below ``run``, but for the directories that are swept anyway."""

    def __init__(self, run: Path, swept: Sequence[Path] = ()) -> None:
        self._run = run
        self._swept = swept
        self._found: dict[Identity, Path] = {}

    def living(self) -> dict[Identity, Path]:
        """Look again and return every one that lives, with the directory whose journal names it."""
        guards: set[Identity] = set()
        for record in records(self._run):
            if record.guard.alive():
                guards.add(record.guard)
            elif not any(record.path.is_relative_to(one) for one in self._swept):
                self._found |= dict.fromkeys(_members(record), record.path.parent)
        alive = {one: path for one, path in self._found.items() if one.alive()}
        guarded = _with_below(guards & alive.keys())
        return {one: path for one, path in alive.items() if one not in guarded}


def _members(record: Record) -> set[Identity]:
    """Return those that live of what a record names, and what is below; never ourselves."""
    us = os.getpid()
    alive = _with_below({one for one in record.members if one.alive()})
    return {one for one in alive if one.pid != us}


def _with_below(roots: set[Identity]) -> set[Identity]:
    if not roots:
        return set()
    try:
        below = guard.descendants({one.pid: one.start for one in roots})
    except OSError as exc:  # without it nobody knows what a living guard has
        raise MachineError(
            f"what runs below {len(roots)} processes cannot be seen: {exc}",
            code=UNVERIFIED,
            hint="ulimit -n",
        ) from exc
    return roots | {Identity(pid, start) for pid, start in below.items()}
