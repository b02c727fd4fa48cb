"""The leak check: what of a test's processes, sockets and files is still there.

Nothing here trusts one way of looking. A process counts as ours when it was noted while it ran
(`Tree`: descendants and the records of guards), when its first environment carries the test's
nonce, or when it is an orphan that has files of the test's virtual environment mapped. Each way
alone is blind to something: a double-forked child is no descendant, a cleared environment holds no
nonce, and a guard maps nothing of the virtual environment.

It reads /proc only, so Linux only, and shares no code with the guards that it judges.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs
import trio

from rbee.home import Home

POLL = 0.05
USES_VENV = "an orphan with files of"
SHM = Path("/dev/shm")
SHM_PREFIXES = ("psm_", "sem.mp-", "torch_", "nccl-", "vllm", "cuda.shm.", "rbee")


class LeakError(AssertionError):
    """Something is left; ``leftovers`` says what."""

    def __init__(self, leftovers: Collection[Leftover], within: float) -> None:
        lines = "".join(f"\n  {leftover}" for leftover in leftovers)
        super().__init__(f"{len(leftovers)} left after {within:g} s:{lines}")
        self.leftovers = tuple(leftovers)


# one process ------------------------------------------------------------------------------------
@attrs.frozen
class Identity:
    """A process for ever: pids come round again, start times (in clock ticks) do not."""

    pid: int
    start: int
    boot_id: str


@attrs.frozen
class Stat:
    """The fields of /proc/PID/stat that matter here."""

    pid: int
    parent: int
    state: str
    start: int

    @property
    def is_zombie(self) -> bool:
        """Whether it has ended, all its threads too, and only waits to be reaped."""
        return self.state in "ZX" and len(_listdir(f"/proc/{self.pid}/task")) <= 1


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_stat(pid: int) -> Stat | None:
    """Return None when there is no such process."""
    text = _read(f"/proc/{pid}/stat").decode(errors="replace")
    if not text:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return Stat(pid, int(fields[1]), fields[0], int(fields[19]))


def identify(pid: int) -> Identity | None:
    """Return the identity of a process, None when it has gone."""
    stat = read_stat(pid)
    return Identity(pid, stat.start, boot_id()) if stat else None


def is_running(identity: Identity) -> bool:
    """Tell whether this very process still runs; a zombie does not."""
    stat = read_stat(identity.pid)
    return (
        stat is not None
        and stat.start == identity.start
        and identity.boot_id == boot_id()
        and not stat.is_zombie
    )


def title_of(pid: int) -> str:
    """Return what ``ps`` shows, "" when the process has gone."""
    return _read(f"/proc/{pid}/cmdline").rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")


def read_environ(pid: int) -> bytes:
    """Return the environment a process started with, b"" when it is gone, not ours or cleared."""
    return _read(f"/proc/{pid}/environ")


def carries(pid: int, name: str, value: str) -> bool:
    """Tell whether a process started with ``name=value`` in its environment."""
    return f"{name}={value}".encode() in read_environ(pid).split(b"\0")


def carriers(nonce: str) -> list[int]:
    """List the running processes that started with this ``RBEE_NONCE``, zombies left out."""
    return [pid for pid in scan() if carries(pid, "RBEE_NONCE", nonce)]


def count_titles(nonce: str) -> Counter[str]:
    """Count the running processes of a nonce by the first word of their titles."""
    words = (title_of(pid).split() for pid in carriers(nonce))
    return Counter(first.removesuffix(":") for first, *_ in filter(None, words))


def scan() -> dict[int, Stat]:
    """Read the state of every process."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return {pid: stat for pid in pids if (stat := read_stat(pid))}


def ancestors(pid: int, stats: Mapping[int, Stat]) -> Iterator[int]:
    """Yield the parent, its parent and so on."""
    while (stat := stats.get(pid)) and stat.parent:
        pid = stat.parent
        yield pid


def descendants(root: int, stats: Mapping[int, Stat]) -> list[int]:
    """List the children of ``root``, their children and so on."""
    children: dict[int, list[int]] = {}
    for stat in stats.values():
        children.setdefault(stat.parent, []).append(stat.pid)
    found: list[int] = []
    todo = [root]
    while todo:
        new = children.get(todo.pop(), [])
        found += new
        todo += new
    return found


# many processes ---------------------------------------------------------------------------------
class Tree:
    """Every process seen below the given ones, held by pidfd; forgets none that has ended.

    Descendants come and go: `refresh` when something new has started, or let `keep_fresh` do it.
    """

    def __init__(self, *roots: int) -> None:
        self._pidfds: dict[Identity, int] = {}
        self.refresh(*roots)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the pidfds back; the identities stay known."""
        for fd in self._pidfds.values():
            if fd >= 0:
                os.close(fd)
        self._pidfds = dict.fromkeys(self._pidfds, -1)

    @property
    def noted(self) -> tuple[Identity, ...]:
        """Every identity ever seen."""
        return tuple(self._pidfds)

    def running(self) -> list[Identity]:
        return [identity for identity in self._pidfds if is_running(identity)]

    def note(self, identity: Identity) -> None:
        """Remember one process; one that has gone is remembered by its identity only."""
        if self._pidfds.get(identity, -1) >= 0:
            return
        fd = -1
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(identity.pid)
        if fd >= 0 and identify(identity.pid) != identity:  # the pid has come round
            os.close(fd)
            fd = -1
        self._pidfds[identity] = fd

    def refresh(self, *roots: int, records_below: Path | None = None) -> None:
        """Note ``roots``, whatever descends from all that was noted, and what guards wrote down.

        Args:
            records_below: a run directory; its ``guard-*.json`` are read.
        """
        stats = scan()
        boot = boot_id()
        if records_below is not None:
            for identity in read_guard_records(records_below):
                self.note(identity)
        known = {*roots, *(i.pid for i in self._pidfds if _is(i, stats))}
        for pid in known.union(*(descendants(pid, stats) for pid in known)):
            if stat := stats.get(pid):
                self.note(Identity(pid, stat.start, boot))

    async def keep_fresh(
        self,
        *,
        every: float = POLL,
        records_below: Path | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Refresh until cancelled."""
        task_status.started()
        while True:
            self.refresh(records_below=records_below)
            await trio.sleep(every)

    def kill(self) -> None:
        """Kill -9 all that still runs, by pidfd; for the end of a test that went wrong."""
        for identity, fd in self._pidfds.items():
            if fd >= 0 and is_running(identity):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)


def _is(identity: Identity, stats: Mapping[int, Stat]) -> bool:
    stat = stats.get(identity.pid)
    return stat is not None and stat.start == identity.start


def read_guard_records(run: Path) -> set[Identity]:
    """Return every process that a ``guard-*.json`` at or below ``run`` tells of."""
    found: set[Identity] = set()
    for path in _walk(run):
        if path.match("guard-*.json"):
            found |= read_guard_record(path)
    return found


def read_guard_record(path: Path) -> set[Identity]:
    """Return every process that one ``guard-*.json`` tells of; none if it has just gone."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return set()  # just removed, or just being written
    return _identities(record, _boot_of(record) or boot_id())


def _boot_of(record: Any) -> str:
    return str(record.get("boot_id", "")) if isinstance(record, dict) else ""


def _identities(record: Any, boot: str) -> set[Identity]:
    """Collect every ``{"pid", "start"}`` at any depth."""
    if isinstance(record, list):
        return set().union(*(_identities(item, boot) for item in record))
    if not isinstance(record, dict):
        return set()
    boot = _boot_of(record) or boot
    found = set().union(*(_identities(item, boot) for item in record.values()))
    match record:
        case {"pid": int(pid), "start": int(start)}:
            found.add(Identity(pid, start, boot))
    return found


# the check --------------------------------------------------------------------------------------
@attrs.frozen
class Leftover:
    """One thing that should have gone.

    ``kind`` is ``process``, ``zombie`` (ended, but its living parent does not reap it), ``socket``,
    ``file``, ``shm``, or ``memory`` of a GPU.
    """

    kind: str
    what: str
    why: str
    pid: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.what} ({self.why})"

    @property
    def is_certain(self) -> bool:
        """Whether it was noted while it ran or carries the test's mark."""
        return not self.why.startswith(USES_VENV)


@attrs.frozen
class Baseline:
    """What was there before the test: it is not the test's to answer for."""

    processes: frozenset[Identity] = attrs.field(factory=lambda: frozenset(_all_identities()))
    shm: frozenset[str] = attrs.field(factory=lambda: frozenset(_listdir(SHM)))


def _all_identities() -> list[Identity]:
    boot = boot_id()
    return [Identity(stat.pid, stat.start, boot) for stat in scan().values()]


@attrs.frozen(kw_only=True)
class LeakCheck:
    """What one test started and where it may have left something.

    Make it before the test starts anything: the baseline is taken then.

    Args:
        home: its run directory must be empty but for locks.
        nonce: ``RBEE_NONCE`` of all that the test starts.
        tree: what was noted while it ran.
        venv: report orphans that have extension modules of this virtual environment mapped.
        ports: nobody may listen on them.
        marker: the variable that holds the nonce.
        users: whose shared memory is looked at.
    """

    home: Home | None = None
    nonce: str = ""
    tree: Tree | None = None
    venv: Path | None = attrs.field(factory=lambda: Path(sys.prefix))
    ports: Collection[int] = ()
    marker: str = "RBEE_NONCE"
    users: Collection[int] = attrs.field(factory=lambda: (os.getuid(),))
    baseline: Baseline = attrs.field(factory=Baseline)

    def find(self, *, spare: Iterable[int] = ()) -> list[Leftover]:
        """List what is left now; ``spare`` are the pids that are meant to live."""
        if self.tree is not None:
            self.tree.refresh(records_below=self.home.run if self.home else None)
        stats = scan()
        spared = {*spare, os.getpid(), *ancestors(os.getpid(), stats)}
        reasons = {
            pid: why for pid, why in self._reasons(stats, spared).items() if pid not in spared
        }
        return [
            *_processes(reasons, stats),
            *self._zombies(stats, set(reasons) | spared),
            *_sockets(reasons, self.ports, spared),
            *self._files(),
            *self._shm(stats, set(reasons)),
        ]

    async def wait_clean(self, within: float, *, spare: Iterable[int] = ()) -> float:
        """Wait until nothing is left and return the seconds that took.

        Raises:
            LeakError: something is left after ``within`` seconds.
        """
        start = time.monotonic()
        while left := self.find(spare=spare):
            if time.monotonic() - start >= within:
                raise LeakError(left, within)
            await trio.sleep(POLL)
        return time.monotonic() - start

    def wait_clean_sync(self, within: float, *, spare: Iterable[int] = ()) -> float:
        """Do as `wait_clean` outside trio."""
        start = time.monotonic()
        while left := self.find(spare=spare):
            if time.monotonic() - start >= within:
                raise LeakError(left, within)
            time.sleep(POLL)
        return time.monotonic() - start

    def kill(self, *, guesses: bool = False) -> list[Leftover]:
        """Kill -9 every process that is certainly the test's; return what `find` found before.

        An orphan that was only seen to use the virtual environment may be somebody's daemon: it is
        reported, and left alone unless ``guesses`` are to be killed too.
        """
        before = found = self.find()
        deadline = time.monotonic() + 5.0  # a process in the kernel (state D) may outlast it
        with Tree() as tree:
            while time.monotonic() < deadline:
                running = [item for item in found if item.kind == "process"]
                pids = [item.pid for item in running if guesses or item.is_certain]
                if not pids:
                    break
                tree.refresh(*pids)
                tree.kill()
                time.sleep(POLL)
                found = self.find()
        return before

    def _reasons(self, stats: Mapping[int, Stat], spared: Collection[int]) -> dict[int, str]:
        """Map each pid that is ours and runs to how that was found out."""
        noted = self.tree.noted if self.tree else ()
        reasons = {i.pid: "noted as a descendant" for i in noted if is_running(i)}
        boot = boot_id()
        for pid, stat in stats.items():
            if pid in reasons or Identity(pid, stat.start, boot) in self.baseline.processes:
                continue
            if self.nonce and carries(pid, self.marker, self.nonce):
                reasons[pid] = f"started with {self.marker}={self.nonce}"
            elif self.venv and self._is_orphan_of_venv(pid, stats, spared):
                reasons[pid] = f"{USES_VENV} {self.venv} mapped"
        return reasons

    def _is_orphan_of_venv(
        self, pid: int, stats: Mapping[int, Stat], spared: Collection[int]
    ) -> bool:
        """Tell whether nobody but init or ourselves answers for a process of the venv.

        Others may be using the same virtual environment at the same time. Their processes have a
        living parent of their own, or a nonce of their own.
        """
        if not maps_below(pid, self.venv) or _has_nonce(pid):
            return False
        line = list(ancestors(pid, stats))
        if os.getpid() in line:
            return True
        owner = next((one for one in line if one in spared or not maps_below(one, self.venv)), 1)
        return owner == 1 or owner in spared

    def _zombies(self, stats: Mapping[int, Stat], ours: set[int]) -> Iterator[Leftover]:
        """Report the noted ones whose parent, one of ours too, lives on and does not reap them."""
        mine = ours - {os.getpid(), *ancestors(os.getpid(), stats)}
        for identity in self.tree.noted if self.tree else ():
            stat = stats.get(identity.pid)
            if stat and _is(identity, stats) and stat.is_zombie and stat.parent in mine:
                why = f"{title_of(stat.parent)!r} [{stat.parent}] does not reap it"
                yield Leftover("zombie", f"[{identity.pid}]", why, identity.pid)

    def _files(self) -> Iterator[Leftover]:
        if self.home is None:
            return
        for path in _walk(self.home.run):
            if path.suffix != ".lock":
                yield Leftover("file", str(path), "in the run directory")

    def _shm(self, stats: Mapping[int, Stat], ours: set[int]) -> Iterator[Leftover]:
        new = {
            name
            for name in set(_listdir(SHM)) - self.baseline.shm
            if name.startswith(SHM_PREFIXES) and _owner(SHM / name) in self.users
        }
        if not new:
            return
        for name in sorted(new - _shm_in_use(pid for pid in stats if pid not in ours)):
            yield Leftover("shm", str(SHM / name), "new since the test began")


def _processes(reasons: Mapping[int, str], stats: Mapping[int, Stat]) -> Iterator[Leftover]:
    for pid, why in sorted(reasons.items()):
        if (stat := stats.get(pid)) and not stat.is_zombie:
            yield Leftover("process", f"{title_of(pid)!r} [{pid}] {stat.state}", why, pid)


def maps_below(pid: int, venv: Path | None) -> bool:
    """Tell whether a process has a file of the environment's site-packages mapped."""
    if venv is None:
        return False
    prefix = f"{venv}/lib".encode()
    lines = _read(f"/proc/{pid}/maps").splitlines()
    return any(prefix in line and b"/site-packages/" in line for line in lines)


def _has_nonce(pid: int) -> bool:
    return any(entry.startswith(b"RBEE_NONCE=") for entry in read_environ(pid).split(b"\0"))


# sockets ----------------------------------------------------------------------------------------
@attrs.frozen
class Listener:
    """A listening TCP socket of this machine."""

    port: int
    inode: int


def listeners() -> list[Listener]:
    """List every listening TCP socket."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _read(table).splitlines()[1:]:
            fields = line.split()
            if fields[3] == b"0A":  # TCP_LISTEN
                found.append(Listener(int(fields[1].rpartition(b":")[2], 16), int(fields[9])))
    return found


def socket_inodes(pid: int) -> set[int]:
    """Return the inodes of the sockets that a process holds open."""
    links = (_readlink(f"/proc/{pid}/fd/{fd}") for fd in _listdir(f"/proc/{pid}/fd"))
    return {int(link[8:-1]) for link in links if link.startswith("socket:[")}


def _sockets(ours: Iterable[int], ports: Collection[int], spared: set[int]) -> Iterator[Leftover]:
    owners = {inode: pid for pid in ours for inode in socket_inodes(pid)}
    kept = set().union(*(socket_inodes(pid) for pid in spared)) if ports else set()
    for listener in listeners():
        what = f"listening on port {listener.port}"
        if pid := owners.get(listener.inode):
            yield Leftover("socket", what, f"of {title_of(pid)!r} [{pid}]", pid)
        elif listener.port in ports and listener.inode not in kept:
            yield Leftover("socket", what, "a port of the test")


# small readers: what has gone meanwhile, or is not ours to read, is empty -------------------------
def _shm_in_use(pids: Iterable[int]) -> set[str]:
    """Return the names below /dev/shm that one of these processes has open or mapped."""
    used = set()
    for pid in pids:
        links = [_readlink(f"/proc/{pid}/fd/{fd}") for fd in _listdir(f"/proc/{pid}/fd")]
        maps = _read(f"/proc/{pid}/maps").decode(errors="replace").splitlines()
        for text in (*links, *maps):
            _, found, name = text.partition(f"{SHM}/")
            if found:
                used.add(name)
    return used


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123  # many thousand times a second
            return file.read()
    except OSError:
        return b""


def _readlink(path: str) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115
    except OSError:
        return ""


def _listdir(path: str | Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _walk(directory: Path) -> Iterator[Path]:
    for parent, directories, files in os.walk(directory):  # rglob fails when one is removed
        yield from (Path(parent, name) for name in sorted((*directories, *files)))


def _owner(path: Path) -> int:
    try:
        return path.stat().st_uid
    except OSError:
        return -1
