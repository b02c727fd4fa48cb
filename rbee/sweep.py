"""The journal of owned processes, and ending what a dead guard left behind.

Each guard keeps ``guard-<pid>.json`` in its run directory: itself, its command, its descendants,
each with its start time, and the shared memory they had mapped. A journal whose guards are all
dead belongs to nobody; what it names may be ended, and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import trio

from rbee import guard

log = logging.getLogger(__name__)

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
    members: tuple[Identity, ...]
    shm: tuple[str, ...]


def records(directory: Path) -> Iterator[Record]:
    """Yield the journal entries of this boot below ``directory``; damaged ones are skipped."""
    boot = guard.boot_id()
    for path in sorted(directory.rglob("guard-*.json")):
        try:
            data = json.loads(path.read_text())
            if data["boot_id"] == boot:
                yield _record(path, data)
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("damaged journal entry %s", path)


def _record(path: Path, data: dict[str, Any]) -> Record:
    members = [data["child"], *data["descendants"]]
    return Record(
        path,
        _identity(data["guard"]),
        tuple(_identity(member) for member in members),
        tuple(shm for shm in data["shm"] if shm.startswith("/dev/shm/")),
    )


def _identity(data: dict[str, int]) -> Identity:
    return Identity(int(data["pid"]), int(data["start"]))


def abandoned(directory: Path) -> bool:
    """Tell whether no guard of this run directory lives (a rebooted machine's have none)."""
    return not any(record.guard.alive() for record in records(directory))


async def sweep(directory: Path, *, within: float = 2.0) -> int:
    """End what the journal below ``directory`` names, remove it; return how many were ended.

    Call it for directories of your own children or for `abandoned` ones only.
    """
    if not directory.exists():
        return 0
    ended: set[Identity] = set()
    shm: set[str] = set()
    with trio.move_on_after(within):
        while True:
            found = list(records(directory))
            shm.update(path for record in found for path in record.shm)
            alive = {one for record in found for one in _all(record) if one.alive()}
            if not alive:
                break
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for one in alive:
                    one.signal(number)
            ended |= alive
            await trio.sleep(0.02)
    for path in shm:
        Path(path).unlink(missing_ok=True)
    guard.remove_tree(str(directory))
    if ended:
        log.warning("swept %d processes that %s had left", len(ended), directory.name)
    return len(ended)


def _all(record: Record) -> tuple[Identity, ...]:
    return (record.guard, *record.members)


def claim(directory: Path) -> None:
    """Make a run directory that this process uses, so that no sweep takes it for abandoned."""
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}")
    temporary.mkdir(mode=0o700)
    pid = os.getpid()
    (temporary / "owner").write_text(f"{guard.boot_id()} {pid} {guard.start_time(pid)}\n")
    temporary.rename(directory)  # nobody sees it without its owner


async def sweep_abandoned(run: Path) -> int:
    """Sweep every run directory below ``run`` whose guards are all dead: a power loss's."""
    total = 0
    for directory in sorted(path for path in run.iterdir() if path.is_dir()):
        if directory.name.startswith(".") and time.time() - directory.stat().st_mtime < UNFINISHED:
            continue
        if abandoned(directory) and not _in_use(directory):
            total += await sweep(directory)
    return total


def _in_use(directory: Path) -> bool:
    """Tell whether the daemon that made the directory lives: it has noted itself in ``owner``."""
    try:
        boot, pid, start = (directory / "owner").read_text().split()
    except (OSError, ValueError):
        return False
    return boot == guard.boot_id() and Identity(int(pid), int(start)).alive()
