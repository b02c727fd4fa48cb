"""The journal of owned processes, and ending what a dead guard left behind.

Each guard keeps ``guard-<pid>.json`` in its run directory: itself, its command, its descendants,
each with its start time, and the shared memory they had mapped. A journal whose guards are all
dead belongs to nobody; what it names may be ended, and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from rbee import guard
from rbee.errors import MachineError
from rbee.remains import stuck, unverified

log = logging.getLogger(__name__)

_ENTRY = re.compile(r"guard-\d+\.json")
POLL = 0.03
UNFINISHED = 60.0  # seconds that a claim may take


@attrs.frozen
class Identity:
    """One process of this boot."""

    pid: int
    start: int

    def alive(self) -> bool:
        return self.start > 0 and guard.start_time(self.pid) == self.start

    def signal(self, number: int) -> bool:
        return guard.send_signal(self.pid, self.start, number)


@attrs.frozen
class Record:
    """One guard's journal entry."""

    path: Path
    guard: Identity
    child: Identity
    members: tuple[Identity, ...]
    shm: tuple[str, ...]
    run_file: str


def records(directory: Path) -> Iterator[Record]:
    """Yield the journal entries of this boot below ``directory``; damaged ones are skipped."""
    boot = guard.boot_id()
    for path in _entries(directory):
        try:
            data = json.loads(path.read_text())
            if data["boot_id"] == boot:
                yield _record(path, data)
        except FileNotFoundError:
            continue  # its guard has just finished
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            log.warning("damaged journal entry %s", path)


def _entries(directory: Path) -> Iterator[Path]:
    for parent, _, files in os.walk(directory):  # rglob fails when a directory goes meanwhile
        yield from (Path(parent, name) for name in sorted(files) if _ENTRY.fullmatch(name))


def _record(path: Path, data: dict[str, Any]) -> Record:
    members = [data["child"], *data["descendants"]]
    return Record(
        path,
        _identity(data["guard"]),
        _identity(data["child"]),
        tuple(_identity(member) for member in members),
        tuple(shm for shm in data["shm"] if guard.is_engines_shm(shm)),
        str(data.get("run_file", "")),
    )


def _identity(data: dict[str, int]) -> Identity:
    return Identity(int(data["pid"]), int(data["start"]))


def abandoned(directory: Path) -> bool:
    """Tell whether no guard of this run directory lives (a rebooted machine's have none)."""
    return not any(record.guard.alive() for record in records(directory))


async def sweep(directory: Path, *, patience: float = 0.0, within: float = 2.0) -> int:
    """End what the journal below ``directory`` names and all below that; remove the directory.

    Returns how many were killed.

    Raises:
        MachineError: some do not end (code ``stuck``), or cannot be seen (``unverified``); the
            directory stays for the next sweep.

    Call it for directories of your own children or for `abandoned` ones only.

    Args:
        patience: seconds that the living may take to end by themselves; whoever has lost his
            guard is just doing so.
        within: seconds to go on killing; a process stuck in the kernel may outlast it.
    """
    journal = Journal(directory)
    with trio.move_on_after(patience):
        while journal.living():
            await trio.sleep(POLL)
    killed = await kill(journal.living, within)
    if left := journal.living():
        raise stuck(directory.name, ((one.pid, one.start) for one in left))
    if hidden := journal.hidden():
        raise unverified(directory.name, (one.pid for one in hidden))
    if killed:
        log.info("swept %d processes that %s had left", len(killed), directory.name)
    journal.remove()
    return len(killed)


async def kill(living: Callable[[], Collection[Identity]], within: float) -> set[Identity]:
    """Kill whom ``living`` finds until it finds nobody, or for so many seconds; return whom."""
    killed: set[Identity] = set()
    with trio.move_on_after(within):
        while alive := _stopped(living):
            for one in alive:
                one.signal(signal.SIGKILL)
            killed |= alive
            await trio.sleep(POLL)
    return killed


def _stopped(living: Callable[[], Collection[Identity]]) -> set[Identity]:
    """Stop the living, and what they forked meanwhile, so that none outruns us."""
    stopped: set[Identity] = set()
    while new := set(living()) - stopped:
        for one in new:
            one.signal(signal.SIGSTOP)
        stopped |= new
    return stopped


class Journal:
    """All that was ever read of the journal below a run directory; its files come and go."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._members: set[Identity] = set()
        self._looked_at: set[Identity] = set()
        self._shm: set[str] = set()
        self._run_files: set[tuple[str, int]] = set()

    def living(self) -> set[Identity]:
        """Read again and return every member that lives, and what lives below it.

        Guards write once a second: what is younger is in no record yet.
        """
        for record in records(self._directory):
            self._members.update((record.guard, *record.members))
            self._shm.update(record.shm)
            if record.run_file:
                self._run_files.add((record.run_file, record.child.pid))
        us = os.getpid()  # to sweep oneself ends half-way
        alive = {one for one in self._members if one.pid != us and one.alive()}
        if alive:
            with suppress(OSError):  # no descriptors left: the records will do
                below = guard.descendants({one.pid: one.start for one in alive})
                alive |= {Identity(pid, start) for pid, start in below.items()}
        for one in alive - self._looked_at:
            self._shm |= guard.shared_memory_of(one.pid)
        self._looked_at |= alive
        self._members |= alive
        return alive

    def hidden(self) -> set[Identity]:
        """Return the members of which /proc does not tell whether they live."""
        return {one for one in self._members if one.start > 0 and guard.is_hidden(one.pid)}

    def remove(self) -> None:
        """Remove what the members left on disk; call it when none is alive."""
        for path in self._shm:
            Path(path).unlink(missing_ok=True)
        for path, pid in self._run_files:
            guard.remove_run_file(path, pid)
        guard.remove_tree(str(self._directory))


def claim(directory: Path) -> None:
    """Make a run directory that this process uses, so that no sweep takes it for abandoned."""
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}")
    temporary.mkdir(mode=0o700)
    pid = os.getpid()
    try:
        (temporary / "owner").write_text(f"{guard.boot_id()} {pid} {guard.start_time(pid)}\n")
        temporary.rename(directory)  # nobody sees it without its owner
    except OSError:
        guard.remove_tree(str(temporary))
        raise


def retire(directory: Path) -> None:
    """Remove the run directory of a daemon that ends, unless something that it names lives on.

    Then it stays as it is, without a living owner: for the next daemon, or for `rbee-keeper reap`.
    """
    journal = Journal(directory)
    if left := journal.living() | journal.hidden():
        pids = " ".join(str(one.pid) for one in left)
        log.warning("%s stays: it names what does not end, %s", directory, pids)
        return
    journal.remove()


async def sweep_abandoned(run: Path, own: Path | None = None) -> int:
    """Sweep every run directory below ``run`` that belongs to nobody: a power loss's."""
    total = 0
    for directory in left_behind(run, own):
        try:
            total += await sweep(directory)
        except MachineError as exc:  # it must not keep a daemon from starting
            log.warning("%s", exc)
    return total


def left_behind(run: Path, own: Path | None = None) -> Iterator[Path]:
    """Yield the run directories below ``run`` whose guards and whose daemon are all dead.

    ``own``: where the caller lives. When his own guards have just died he is the one to end, by his
    lifeline; sweeping himself he would be stopped, and not live to go on to the kill.
    """
    for directory in sorted(path for path in run.iterdir() if path.is_dir()):
        is_own = own is not None and own.is_relative_to(directory)
        if not (is_own or _is_new(directory)) and abandoned(directory) and not _in_use(directory):
            yield directory


def _is_new(directory: Path) -> bool:
    """Tell whether it is just being claimed, or has been removed already by somebody else."""
    try:
        age = time.time() - directory.stat().st_mtime
    except FileNotFoundError:
        return True
    return directory.name.startswith(".") and age < UNFINISHED


def _in_use(directory: Path) -> bool:
    """Tell whether the daemon that made the directory lives: it has noted itself in ``owner``."""
    try:
        boot, pid, start = (directory / "owner").read_text().split()
        owner = Identity(int(pid), int(start))
    except (OSError, ValueError):
        return False
    return boot == guard.boot_id() and owner.alive()
