"""What rbee has left on this machine: found by the journal, told, and ended if asked to.

Only a run directory without a living guard and without a living daemon is looked at, and in it only
what its journal names by pid and start time, and what is below that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs

from rbee.daemon import read_run_file, remove_stale
from rbee.errors import MachineError
from rbee.home import Home
from rbee.remains import Remnant, look_at
from rbee.sweep import Identity, Journal, left_behind, sweep

FOUND, ENDED = "found", "ended"


@attrs.frozen
class Leftover:
    """One process or path that rbee has left.

    Attributes:
        kind: ``process``, ``directory`` (a run directory) or ``file`` (a dead daemon's run file).
        path: the run directory or file.
        outcome: ``found``, ``ended``, or what `rbee.remains.LEFT` tells of it.
        process: None for a path.
    """

    kind: str
    path: str
    outcome: str
    process: Remnant | None = None


@attrs.frozen
class Reaped:
    """What there was, and why some of it is there still."""

    leftovers: tuple[Leftover, ...] = ()
    errors: tuple[MachineError, ...] = ()


def find(home: Home) -> Reaped:
    """Tell what is left, and end nothing."""
    if not home.run.is_dir():
        return Reaped()
    found: list[Leftover] = []
    for directory in left_behind(home.run):
        processes = _processes(Journal(directory))
        found += [_process(directory, one, FOUND) for one in processes.values()]
        found.append(Leftover("directory", str(directory), FOUND))
    files = (Leftover("file", str(path), FOUND) for path, _ in _stale(home))
    return Reaped((*found, *files))


async def end(home: Home) -> Reaped:
    """End and remove what is left; an error each for what does not end."""
    if not home.run.is_dir():
        return Reaped()
    found: list[Leftover] = []
    errors: list[MachineError] = []
    for directory in left_behind(home.run):
        processes = _processes(Journal(directory))
        outcome = ENDED
        try:
            await sweep(directory)
        except MachineError as exc:
            outcome = exc.code
            errors.append(exc)
        for identity, one in processes.items():
            found.append(_process(directory, one, outcome if identity.alive() else ENDED))
        found.append(Leftover("directory", str(directory), outcome))
    for path, what in _stale(home):
        remove_stale(path, what)
        found.append(Leftover("file", str(path), ENDED))
    return Reaped(tuple(found), tuple(errors))


def _processes(journal: Journal) -> dict[Identity, Remnant]:
    living = sorted(journal.living(), key=lambda one: one.pid)
    return {one: seen for one in living if (seen := look_at(one.pid, one.start))}


def _process(directory: Path, process: Remnant, outcome: str) -> Leftover:
    return Leftover("process", str(directory), outcome, process)


def _stale(home: Home) -> Iterator[tuple[Path, str]]:
    """Yield the run files of daemons that are gone."""
    for path, what in ((home.queen_file, "queen"), (home.hive_file, "hive")):
        if path.exists() and read_run_file(path) is None:
            yield path, what
