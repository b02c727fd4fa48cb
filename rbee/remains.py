"""What of a process tree is still there, in words and as data: nobody says "stopped" before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from rbee import guard
from rbee.errors import MachineError, RbeeError
from rbee.model import WorkerState
from rbee.units import human

STUCK, UNVERIFIED = WorkerState.STUCK.value, WorkerState.UNVERIFIED.value
LEFT = frozenset({STUCK, UNVERIFIED})  # states of a worker, and the codes of the errors about it
PROCESSES = "processes"  # in an error's details: what `Remnant` tells, as a list


@attrs.frozen
class Remnant:
    """A process that should have gone.

    Attributes:
        state: the letter that ps shows (D: it is in the kernel, t: a debugger holds it).
        place: the kernel's function that it waits in; "" where that is not told.
        memory: bytes that it holds.
    """

    pid: int
    name: str
    state: str
    place: str = ""
    memory: int = 0

    def __str__(self) -> str:
        where = f" in {self.place}" if self.place else ""
        return f"{self.name} [{self.pid}] (state {self.state}{where}, {human(self.memory)})"


def look_at(pid: int, start: int) -> Remnant | None:
    """Describe a process; None if it has gone meanwhile."""
    name, status = _read(pid, "cmdline").replace("\0", " ").strip(), _read(pid, "status")
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    place = _read(pid, "wchan").strip("0")
    if guard.start_time(pid) != start:
        return None
    memory = int(facts.get("VmRSS", "0").split()[0]) * 1024
    name = " ".join(name.split()[:3]) or facts.get("Name", "")
    return Remnant(pid, name, facts.get("State", "?")[:1], place, memory)


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def stuck(what: str, identities: Iterable[tuple[int, int]]) -> MachineError:
    """Make the error about processes of ``what`` that live on although they were killed."""
    identities = sorted(identities)
    found = [remnant for one in identities if (remnant := look_at(*one))]
    pids = ",".join(str(pid) for pid, _ in identities)
    told = ", ".join(map(str, found)) or pids
    count = len(identities)
    which = f"{count} processes of {what} do" if count > 1 else f"a process of {what} does"
    return MachineError(
        f"{which} not end, not even killed: {told}",
        code=STUCK,
        hint=f"ps -o pid,stat,wchan,args -p {pids}",
        **{PROCESSES: [attrs.asdict(remnant) for remnant in found]},
    )


def unverified(what: str, pids: Iterable[int]) -> MachineError:
    """Make the error about processes of ``what`` that /proc does not show us."""
    told = ", ".join(map(str, sorted(pids)))
    return MachineError(
        f"whether {what} has ended cannot be seen: process {told} is there, /proc does not show it",
        code=UNVERIFIED,
        hint="findmnt --noheadings --output OPTIONS /proc   # hidepid hides them",
        **{PROCESSES: [{"pid": pid} for pid in sorted(pids)]},
    )


def as_left(error: BaseException | None) -> RbeeError | None:
    """Return an error that is about what has not gone, or may not have; None for any other."""
    return error if isinstance(error, RbeeError) and error.code in LEFT else None


def in_short(details: Mapping[str, Any]) -> str:
    """Return the processes that an error's details name, in few words; "" for none."""
    return ", ".join(_short(one) for one in details.get(PROCESSES, ()) if isinstance(one, dict))


def _short(told: Mapping[str, Any]) -> str:
    try:
        return str(Remnant(**told))
    except (TypeError, ValueError):  # only its pid is known
        return f"pid {told.get('pid', '?')}"
