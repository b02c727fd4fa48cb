"""A kernel of a few pids, which come round at once: what is signalled there, and what should be.

`Kernel.install` puts it below `rbee.guard`. Before each look that the code under test takes, other
processes may fork, exit and be reaped, as the test's random numbers want it.
"""

from __future__ import annotations

import errno
import os
import time
from random import Random
from types import ModuleType
from typing import Any

import attrs
import pytest

from rbee import guard

PIDS = range(1, 12)
INIT, GUARD = 1, 2
EVENTS = 40  # then nothing happens by itself any more


@attrs.define(eq=False)
class Proc:
    """A process; ``ours`` goes on to whatever it forks, its parent does not stay."""

    pid: int
    start: int
    parent: Proc | None
    ours: bool
    is_zombie: bool = False
    is_stopped: bool = False
    is_killed: bool = False
    signals: list[int] = attrs.field(factory=list)


class Kernel:
    """Processes that live and die at random, below init and one guard."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.clock = 0
        self.events = EVENTS
        self.table: dict[int, Proc] = {}
        self.pidfds: dict[int, Proc] = {}
        self.hit: list[Proc] = []
        self.init = self.fork(None, ours=False)
        self.guard = self.fork(self.init, ours=True)

    def fork(self, parent: Proc | None, *, ours: bool | None = None, pid: int = 0) -> Proc:
        self.clock += 1
        pid = pid or next(pid for pid in PIDS if pid not in self.table)
        is_ours = parent.ours if ours is None and parent else bool(ours)
        proc = self.table[pid] = Proc(pid, self.clock, parent, is_ours)
        return proc

    def exit(self, proc: Proc) -> None:
        proc.is_zombie = True
        heir = self.guard if proc.ours and not self.guard.is_zombie else self.init
        for child in self.table.values():
            if child.parent is proc:
                child.parent = heir

    def reap(self, proc: Proc) -> None:
        del self.table[proc.pid]

    def living(self, *, ours: bool) -> list[Proc]:
        kept = (self.init, self.guard)
        every = self.table.values()
        return [one for one in every if one.ours is ours and one not in kept and not one.is_zombie]

    # what happens meanwhile -------------------------------------------------------------------
    def tick(self) -> None:
        """Let a few things happen, as they may between any two system calls."""
        while self.events and self.random.random() < 0.6:
            self.events -= 1
            self.random.choice(
                [self._some_fork, self._some_exit, self._some_reap, self._some_replaced]
            )()
        for proc in list(self.table.values()):
            if proc.is_killed and not proc.is_zombie and self.random.random() < 0.7:
                self.exit(proc)

    def _some_fork(self) -> None:
        able = [one for one in self.table.values() if not (one.is_zombie or one.is_stopped)]
        able = [one for one in able if one is not self.guard]
        if able and len(self.table) < len(PIDS):
            self.fork(self.random.choice(able))

    def _some_exit(self) -> None:
        able = [*self.living(ours=True), *self.living(ours=False)]
        if able:
            self.exit(self.random.choice(able))

    def _some_reap(self) -> None:
        """Reap as parents do, and as the kernel does for those who ignore SIGCHLD."""
        able = [one for one in self.table.values() if one.is_zombie]
        able = [one for one in able if one.parent is not self.guard or self.guard.is_zombie]
        if able:
            self.reap(self.random.choice(able))

    def _some_replaced(self) -> None:
        """End a process and give its pid to somebody else's, who forks at once."""
        able = [one for one in self.living(ours=True) if one.parent is not self.guard]
        if able:
            victim = self.random.choice(able)
            self.exit(victim)
            self.reap(victim)
            other = self.fork(self.init, pid=victim.pid)
            if len(self.table) < len(PIDS):
                self.fork(other)

    # system calls -----------------------------------------------------------------------------
    def stat(self, pid: int) -> list[bytes]:
        self.tick()
        proc = self.table.get(pid)
        if proc is None:
            raise FileNotFoundError(pid)
        fields = [b"0"] * 50
        fields[0] = b"Z" if proc.is_zombie else b"T" if proc.is_stopped else b"S"
        fields[1] = b"%d" % (proc.parent.pid if proc.parent else 0)
        fields[17] = b"1"
        fields[19] = b"%d" % proc.start
        return fields

    def children(self, pid: int) -> list[int]:
        self.tick()
        every = self.table.values()
        return [one.pid for one in every if one.parent is not None and one.parent.pid == pid]

    def listdir(self, path: str) -> list[str]:
        assert path == "/proc"
        self.tick()
        return [str(pid) for pid in self.table]

    def pidfd_open(self, pid: int) -> int:
        self.tick()
        if pid not in self.table:
            raise ProcessLookupError(errno.ESRCH, "no such process")
        fd = len(self.pidfds) + 1000
        self.pidfds[fd] = self.table[pid]
        return fd

    def signal_pidfd(self, pidfd: int, number: int) -> bool:
        self.tick()
        proc = self.pidfds[pidfd]
        if self.table.get(proc.pid) is not proc:
            return False
        self.hit.append(proc)
        proc.signals.append(number)
        proc.is_stopped = True  # by SIGSTOP or, as good, by SIGKILL
        proc.is_killed = proc.is_killed or number == 9
        return True

    def waitpid(self, pid: int, flags: int) -> tuple[int, int]:
        self.tick()
        mine = [one for one in self.table.values() if one.parent is self.guard]
        if not mine:
            raise ChildProcessError
        ended = [one for one in mine if one.is_zombie]
        if not ended:
            return 0, 0
        self.reap(ended[0])
        return ended[0].pid, 9

    # instead of the real one ------------------------------------------------------------------
    def install(self, patch: pytest.MonkeyPatch) -> None:
        names = ("listdir", "pidfd_open", "waitpid")
        functions = {name: getattr(self, name) for name in names}
        patch.setattr(guard, "os", _Instead(os, functions, getpid=lambda: GUARD, close=_nothing))
        patch.setattr(guard, "time", _Instead(time, {}, sleep=lambda seconds: self.tick()))
        patch.setattr(guard, "_stat", self.stat)
        patch.setattr(guard, "children", self.children)
        patch.setattr(guard, "signal_pidfd", self.signal_pidfd)
        patch.setattr(guard, "shared_memory_of", lambda pid: set())


class _Instead:
    """A module but for some functions."""

    def __init__(self, module: ModuleType, functions: dict[str, Any], **more: Any) -> None:
        self._module = module
        self.__dict__ |= functions | more

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _nothing(fd: int) -> None:
    pass
