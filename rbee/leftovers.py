"""What rbee has left on this machine: found by the journal, told, and ended if asked to.

What is ended lies in a run directory without a living guard and without a living daemon: what its
journal names by pid and start time, and what is below that. In the directories that are in use, it
is what has lost its guard (`rbee.strays`). What a living guard is ending is left to it, and told.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import trio

from rbee.daemon import read_run_file, remove_stale
from rbee.errors import MachineError
from rbee.home import Home
from rbee.remains import STUCK, Remnant, look_at, stuck
from rbee.strays import Strays
from rbee.sweep import Identity, Journal, kill, left_behind, records, sweep

FOUND, ENDING, ENDED = "found", "ending", "ended"
PATIENCE = 7.0  # seconds for guards, and for a hive that has lost them, to come to an end
KILLING = 2.0  # seconds to go on killing what has no guard
POLL = 0.05


@attrs.frozen
class Leftover:
    """One process or path that rbee has left.

    Attributes:
        kind: ``process``, ``directory`` (a run directory) or ``file`` (a dead daemon's run file).
        path: the run directory or file.
        outcome: ``found``, ``ending`` (by its guard), ``ended``, or one of `rbee.remains.LEFT`.
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
    behind = list(left_behind(home.run))
    ending = {one.identity: one.told(ENDING) for one in _being_ended(home)}
    alone = {one.identity: one.told(FOUND) for one in _unguarded(Strays(home.run, behind))}
    found = list((alone | ending).values())
    for directory in behind:
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
    behind = list(left_behind(home.run))
    for directory in behind:
        processes = _processes(Journal(directory))
        outcome = ENDED
        try:
            await sweep(directory)
        except MachineError as exc:
            outcome = exc.code
            errors.append(exc)
        found += [
            _process(directory, seen, outcome if identity.alive() else ENDED)
            for identity, seen in processes.items()
        ]
        found.append(Leftover("directory", str(directory), outcome))
    for path, what in _stale(home):
        remove_stale(path, what)
        found.append(Leftover("file", str(path), ENDED))
    for one in await _end_the_rest(home, Strays(home.run, behind)):
        outcome = STUCK if one.identity.alive() else ENDED
        found.append(one.told(outcome))
        if outcome == STUCK:
            errors.append(stuck(one.directory.name, [(one.identity.pid, one.identity.start)]))
    return Reaped(tuple(found), tuple(errors))


@attrs.frozen
class _Ending:
    """A process that has to end; ``directory`` is where its guard has noted it."""

    directory: Path
    identity: Identity
    seen: Remnant

    def told(self, outcome: str) -> Leftover:
        return _process(self.directory, self.seen, outcome)


async def _end_the_rest(home: Home, strays: Strays) -> list[_Ending]:
    """Give the guards that are ending something their time, and end what has none.

    That has the same time before: a daemon without its guards is coming to an end by itself.
    """
    begun = {one.identity: one for one in (*_unguarded(strays), *_being_ended(home))}
    with trio.move_on_after(PATIENCE):
        while any(identity.alive() for identity in begun):
            await trio.sleep(POLL)
    begun |= {one.identity: one for one in _unguarded(strays)}
    await kill(strays.living, within=KILLING)
    return list(begun.values())


def _unguarded(strays: Strays) -> Iterator[_Ending]:
    """Yield what has lost its guard."""
    for one, directory in strays.living().items():
        if seen := look_at(one.pid, one.start):
            yield _Ending(directory, one, seen)


def _being_ended(home: Home) -> Iterator[_Ending]:
    """Yield what living guards have below them whose command has ended."""
    for record in records(home.run):
        if record.guard.alive() and not record.child.alive():
            for one in record.members:
                if one.alive() and (seen := look_at(one.pid, one.start)):
                    yield _Ending(record.path.parent, one, seen)


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
