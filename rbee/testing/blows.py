"""Blows: one thing each that goes wrong in a cluster, at one moment, and how much it ends."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Protocol

import attrs

from rbee.guard import send_signal
from rbee.model import LOCALHOST
from rbee.testing.census import OF_WORKER, SESSION, Census, Placed
from rbee.testing.deaths import IGNORED, OWNERS
from rbee.testing.host import Direction, Host
from rbee.testing.processes import Identity

FILLER = "full"
WAYS: tuple[Direction, ...] = ("to", "from")


class Reach(IntEnum):
    """How much a blow ends."""

    NOTHING, WORKER, ZYGOTE, NODE, ALL = range(5)


@attrs.frozen
class Field:
    """Where blows land: the hosts by their nodes, and who was there a moment ago."""

    hosts: Mapping[str, Host]
    census: Census


class Blow(Protocol):
    """One thing that goes wrong at one moment.

    Attributes:
        node: where.
        reach: how much it ends.
        silent: whether its node hears nothing of it, and has to wait for its lease.
        lasts: whether what it hit lives on, hurt, until it is ended.
    """

    @property
    def node(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def reach(self) -> Reach: ...
    @property
    def silent(self) -> bool: ...
    @property
    def lasts(self) -> bool: ...
    def strike(self, field: Field) -> None: ...
    def undo(self, field: Field) -> None: ...


def reach_of(role: str) -> Reach:
    """Tell how much ends with a process."""
    if role in OWNERS:
        return Reach.ALL
    if role in OF_WORKER:
        return Reach.WORKER
    return Reach.ZYGOTE if role == "zygote" else Reach.NODE


def doomed(blow: Blow, census: Census) -> set[Identity]:
    """Return what has to end by itself after a blow."""
    if isinstance(blow, OomKill):
        victim = blow.victim(census)
        return _doomed_with(victim, census) if victim else set()
    match blow.reach:
        case Reach.NOTHING:
            return set()
        case Reach.ALL:
            return census.below(one for one in census.placed if one.role != SESSION)
        case Reach.NODE:
            return census.below(census.on(blow.node))
    victims = census.find(blow.role, blow.node)
    return _doomed_with(victims[0], census) if victims else set()


def _doomed_with(victim: Placed, census: Census) -> set[Identity]:
    """Return what ends with a process of a node."""
    match reach_of(victim.role):
        case Reach.NODE:
            return census.below(census.on(victim.node))
        case Reach.ZYGOTE:
            return census.below([victim])
    return census.below(one for one in census.placed if one.pid == victim.worker)


@attrs.frozen
class Signal:
    """A signal to one process: the first of its role on its node."""

    number: signal.Signals
    role: str
    node: str

    def __str__(self) -> str:
        where = "" if self.role in OWNERS else f" on {self.node}"
        return f"{self.number.name} {self.role}{where}"

    @property
    def freezes(self) -> bool:
        return self.number == signal.SIGSTOP

    @property
    def reach(self) -> Reach:
        if self.number in IGNORED.get(self.role, ()):
            return Reach.NOTHING
        if self.role == SESSION and self.number not in (signal.SIGKILL, signal.SIGSTOP):
            return Reach.NOTHING  # sshd's own to decide
        if self.freezes:
            return Reach.NODE if self.role == SESSION else Reach.NOTHING
        return reach_of(self.role)

    @property
    def silent(self) -> bool:
        return self.freezes

    @property
    def lasts(self) -> bool:
        return self.freezes and self.role != SESSION

    def strike(self, field: Field) -> None:
        for one in self._victims(field.census):
            send_signal(one.pid, one.identity.start, self.number)

    def _victims(self, census: Census) -> Sequence[Placed]:
        found = census.find(self.role, self.node)
        return found if self.role == SESSION else found[:1]  # a session is two processes

    def undo(self, field: Field) -> None:
        """Nothing else would wake sshd; ours are to be ended as they are."""
        if self.freezes and self.role == SESSION:
            for one in self._victims(field.census):
                send_signal(one.pid, one.identity.start, signal.SIGKILL)


@attrs.frozen
class Cut:
    """Nothing gets to a host any more, or nothing from it, or neither."""

    node: str
    directions: tuple[Direction, ...] = ()
    role: str = ""
    reach: Reach = Reach.NODE
    silent: bool = True
    lasts: bool = False

    def __str__(self) -> str:
        return f"nothing gets {' and '.join(self.directions or WAYS)} {self.node}"

    def strike(self, field: Field) -> None:
        field.hosts[self.node].partition(*self.directions)

    def undo(self, field: Field) -> None:
        field.hosts[self.node].heal()


@attrs.frozen
class Impairment:
    """A host's network is bad."""

    node: str
    delay: float = 0.0
    loss: float = 0.0
    role: str = ""
    reach: Reach = Reach.NOTHING
    silent: bool = True
    lasts: bool = True

    def __str__(self) -> str:
        return f"{self.node}: {self.delay:g} s of delay, {self.loss:.0%} lost"

    def strike(self, field: Field) -> None:
        field.hosts[self.node].impair(delay=self.delay, loss=self.loss)

    def undo(self, field: Field) -> None:
        field.hosts[self.node].impair()


@attrs.frozen
class SshdDeath:
    """A host's sshd is killed, with all its sessions."""

    node: str
    role: str = ""
    reach: Reach = Reach.NODE
    silent: bool = False
    lasts: bool = False

    def __str__(self) -> str:
        return f"sshd of {self.node} is killed"

    def strike(self, field: Field) -> None:
        field.hosts[self.node].kill_sessions()
        field.hosts[self.node].stop_sshd()

    def undo(self, field: Field) -> None:
        field.hosts[self.node].start_sshd()


@attrs.frozen
class PowerLoss:
    """Everything on a machine ends in the same moment."""

    node: str
    role: str = ""
    silent: bool = False
    lasts: bool = False

    def __str__(self) -> str:
        return f"{self.node} loses its power"

    @property
    def reach(self) -> Reach:
        return Reach.ALL if self.node == LOCALHOST else Reach.NODE

    def strike(self, field: Field) -> None:
        victims = list(self._victims(field))
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for one in victims:
                send_signal(one.pid, one.start, number)

    def _victims(self, field: Field) -> Iterable[Identity]:
        if self.node != LOCALHOST:
            host = field.hosts[self.node]
            return [one.identity for one in (*host.processes(), *host.sessions())]
        return [one.identity for one in field.census.placed if one.node == LOCALHOST]

    def undo(self, field: Field) -> None:
        """The power is back; nothing starts by itself."""


@attrs.frozen
class MemoryLimit:
    """A process gets no more memory: what it asks for fails."""

    role: str
    node: str
    reach: Reach = Reach.NOTHING
    silent: bool = False
    lasts: bool = True

    def __str__(self) -> str:
        return f"no more memory for {self.role} on {self.node}"

    def strike(self, field: Field) -> None:
        for one in field.census.find(self.role, self.node)[:1]:
            with suppress(OSError, ValueError):  # it has gone
                limit = _address_space(one.pid)
                resource.prlimit(one.pid, resource.RLIMIT_AS, (limit, limit))

    def undo(self, field: Field) -> None:
        """It keeps it till its end."""


def _address_space(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGESIZE")


@attrs.frozen
class OomKill:
    """What the kernel does when a node has no more memory: it kills whom it rates worst."""

    node: str
    role: str = ""
    reach: Reach = Reach.WORKER
    silent: bool = False
    lasts: bool = False

    def __str__(self) -> str:
        return f"out of memory on {self.node}"

    def victim(self, census: Census) -> Placed | None:
        """Return who it would be: by its own rating, which ours have told it to raise or not."""
        return max(census.on(self.node), key=lambda one: _badness(one.pid), default=None)

    def strike(self, field: Field) -> None:
        if victim := self.victim(field.census):
            send_signal(victim.pid, victim.identity.start, signal.SIGKILL)

    def undo(self, field: Field) -> None:
        """With the process its memory is back."""


def _badness(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/oom_score").read_text())
    except (OSError, ValueError):  # it has gone
        return -1


@attrs.frozen
class FullDisk:
    """A host's home and run directory take no more bytes."""

    node: str
    role: str = ""
    reach: Reach = Reach.NOTHING
    silent: bool = False
    lasts: bool = True

    def __str__(self) -> str:
        return f"the disk of {self.node} is full"

    def strike(self, field: Field) -> None:
        for disk in disks_of(field.hosts[self.node]):
            _on(field.hosts[self.node], f"cat /dev/zero > {disk}/{FILLER} 2>/dev/null; true")

    def undo(self, field: Field) -> None:
        for disk in disks_of(field.hosts[self.node]):
            _on(field.hosts[self.node], f"rm -f {disk}/{FILLER}")


def disks_of(host: Host) -> tuple[Path, Path]:
    """Return a host's ``RBEE_HOME`` and run directory, as it calls them."""
    root = host.home / ".rbee"
    return root, Path(os.readlink(root / "run"))  # noqa: PTH115


def _on(host: Host, script: str) -> None:
    host.run(["sh", "-c", script], root=True)
