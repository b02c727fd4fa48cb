"""Who is there: every process of a cluster on all its machines, by its place in the tree."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from rbee.model import LOCALHOST
from rbee.testing.cluster import MARKS, PROCESSES
from rbee.testing.host import Host, all_processes
from rbee.testing.processes import (
    Identity,
    Leftover,
    Stat,
    boot_id,
    descendants,
    is_running,
    read_guard_record,
    read_guard_records,
    scan,
    title_of,
)

SESSION = "ssh session"
ON_NODE = PROCESSES[PROCESSES.index("guard A") :]
OF_WORKER = PROCESSES[PROCESSES.index("worker guard") :]
_OWNED = re.compile(r"\.?[a-z][0-9a-f]{8}")  # the directory of a queen, a hive or a worker
_RECORD = re.compile(r"guard-\d+\.json")


@attrs.frozen
class Placed:
    """One process and its place; ``worker`` is the guard of the worker that it belongs to."""

    role: str
    node: str
    identity: Identity
    worker: int = 0

    @property
    def pid(self) -> int:
        return self.identity.pid


@attrs.frozen
class Census:
    """All processes of one moment, parents before children."""

    placed: tuple[Placed, ...]
    stats: Mapping[int, Stat] = attrs.field(repr=False)

    def find(self, role: str, node: str) -> list[Placed]:
        """List who has a role on a node; those above the hives are on this machine."""
        return [one for one in self.placed if (one.role, one.node) == (role, node)]

    def on(self, node: str) -> list[Placed]:
        """List what a node's hive, its guards and its workers consist of."""
        return [one for one in self.placed if one.node == node and one.role in ON_NODE]

    def below(self, placed: Iterable[Placed]) -> set[Identity]:
        """Return these processes and all that descends from them, whatever it is."""
        boot = boot_id()
        pids = {one.pid for one in placed}
        pids |= {below for pid in pids for below in descendants(pid, self.stats)}
        return {Identity(pid, self.stats[pid].start, boot) for pid in pids if pid in self.stats}


def take_census(keeper: int, hosts: Mapping[str, Host]) -> Census:
    """Look at a keeper's tree, and at the processes of the hosts behind its nodes."""
    stats = {pid: stat for pid, stat in scan().items() if not stat.is_zombie}
    family = _Family(stats)
    placed = list(family.below([keeper], PROCESSES, LOCALHOST))
    found = all_processes(hosts.values(), sshd=True)
    for node, host in hosts.items():
        sessions = {one.pid: one for one in found[host] if host.is_session(one)}
        there = {one.pid: one for one in found[host] if one.pid not in sessions}
        tops = [pid for pid, one in there.items() if one.parent not in there]
        placed += family.below(tops, ON_NODE, node)
        placed += [Placed(SESSION, node, one.identity) for one in sessions.values()]
    return Census(tuple(placed), stats)


class _Family:
    def __init__(self, stats: Mapping[int, Stat]) -> None:
        self._stats = stats
        self._children: dict[int, list[int]] = {}
        self._boot = boot_id()
        for stat in stats.values():
            self._children.setdefault(stat.parent, []).append(stat.pid)

    def below(
        self, pids: Iterable[int], roles: Sequence[str], node: str, worker: int = 0
    ) -> Iterator[Placed]:
        """Yield those of ``pids`` that have the first role, and those below that have the next."""
        for pid in sorted(pids):
            if not self._has_role(pid, roles[0]):
                continue
            of = pid if roles[0] == "worker guard" else worker
            yield Placed(roles[0], node, Identity(pid, self._stats[pid].start, self._boot), of)
            if roles[1:]:
                yield from self.below(self._children.get(pid, ()), roles[1:], node, of)

    def _has_role(self, pid: int, role: str) -> bool:
        """Tell a lasting process from a passing one, and from the fork that it was a moment ago."""
        if pid not in self._stats:
            return False
        title = title_of(pid)
        return role == "keeper" or any(mark in title for mark in MARKS[role])


def ownerless(run: Path) -> Iterator[Leftover]:
    """Yield what lies in a run directory in use and belongs to nobody who lives."""
    for parent, directories, files in os.walk(run):
        for name in directories:
            if _OWNED.fullmatch(name) and not _has_owner(Path(parent, name)):
                yield Leftover("file", f"{parent}/{name}", "nobody who is recorded in it lives")
        for name in files:
            if _RECORD.fullmatch(name) and not _runs(read_guard_record(Path(parent, name))):
                yield Leftover("file", f"{parent}/{name}", "nobody whom it records lives")


def _has_owner(directory: Path) -> bool:
    return _runs(read_guard_records(directory)) or _runs(_claimed_by(directory / "owner"))


def _runs(identities: Iterable[Identity]) -> bool:
    return any(is_running(one) for one in identities)


def _claimed_by(path: Path) -> list[Identity]:
    try:
        boot, pid, start = path.read_text().split()
        return [Identity(int(pid), int(start), boot)]
    except (OSError, ValueError):
        return []
