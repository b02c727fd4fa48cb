"""One throw-away host: what runs on it, its sshd, its network. `rbee.testing.hosts` makes them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import attrs
import trio

from rbee import guard
from rbee.errors import MachineError
from rbee.testing import namespaces
from rbee.testing.bad_link import BadLink
from rbee.testing.host_init import START_SSHD, read_pid
from rbee.testing.processes import (
    Identity,
    LeakError,
    Leftover,
    Stat,
    boot_id,
    descendants,
    identify,
    is_running,
    scan,
    title_of,
)
from rbee.testing.sshd import Place, find_program

WAIT_LIMIT = 10.0
POLL = 0.005
PATH = "/usr/local/bin:/usr/bin:/bin"

Direction = Literal["to", "from"]
BOTH: tuple[Direction, ...] = ("to", "from")


@attrs.frozen
class HostProcess:
    """A process on a host, by the pid that this machine knows it by."""

    identity: Identity
    parent: int
    title: str

    @property
    def pid(self) -> int:
        return self.identity.pid

    def signal(self, number: int = signal.SIGKILL) -> bool:
        """Signal exactly this process; False when it has gone."""
        return guard.send_signal(self.identity.pid, self.identity.start, number)


@attrs.define(eq=False)
class Link:
    """The cable between a host and the others; there is none on loopback.

    Each direction is one queue of the kernel: ``to`` the host at the switch's port, ``from`` it at
    its own interface.
    """

    ends: Mapping[Direction, tuple[int, str]]
    cut: frozenset[Direction] = frozenset()
    _shape: str = ""
    _bad: BadLink | None = None

    def cut_off(self, cut: frozenset[Direction]) -> None:
        self.cut = cut
        self._set_queues()

    def impair(self, delay: float, loss: float) -> None:
        """Delay and lose; without ``netem`` in the kernel a program of ours does it."""
        if self._bad is not None:
            self._bad.remove()
            self._bad = None
        is_bad = bool(delay or loss)
        kernel_can = namespaces.has_netem()
        if is_bad and not kernel_can:
            pid, port = self.ends["to"]
            self._bad = BadLink.splice(pid, port, delay=delay, loss=loss)
        self._shape = (
            f"netem delay {delay * 1000:g}ms loss {loss * 100:g}%" if is_bad and kernel_can else ""
        )
        self._set_queues()

    def _set_queues(self) -> None:
        for direction, (pid, interface) in self.ends.items():
            # A black hole swallows silently: no RST, no FIN, no error for who sends.
            queue = "blackhole" if direction in self.cut else self._shape or "pfifo"
            in_network = ["nsenter", "-t", str(pid), "-n", find_program("tc")]
            _run([*in_network, "qdisc", "replace", "dev", interface, "root", *queue.split()])


@attrs.frozen(eq=False)
class Host:
    """One throw-away host. All methods are quick and synchronous, except `run`.

    Attributes:
        user: whom its sshd lets in with `key`.
        home: where this user is at home.
        known_hosts: the host's line for a known_hosts file.
        hashed_known_hosts: the same, its names hashed.
        can_partition: whether its network can be cut.
        why_no_partition: why not, "" if it can; for a test to skip with.
    """

    place: Place
    user: str
    uid: int
    gid: int
    home: Path
    key: Path
    known_hosts: str
    hashed_known_hosts: str
    environment: Mapping[str, str]
    why_no_partition: str
    init: Identity
    network: int
    link: Link = attrs.field(repr=False)

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def address(self) -> str:
        return self.place.address

    @property
    def port(self) -> int:
        return self.place.port

    @property
    def log(self) -> Path:
        """What its sshd wrote."""
        return self.place.log

    @property
    def can_partition(self) -> bool:
        return not self.why_no_partition

    # what runs on it ----------------------------------------------------------------------------
    def argv(self, *command: str | os.PathLike[str], root: bool = False) -> list[str]:
        """Return the command line that runs ``command`` on the host without SSH, as its user.

        It finds the environment of a login. What it starts ends with the hosts, at the latest;
        on loopback it is not among `processes`.
        """
        environment = {"HOME": str(self.home), "USER": self.user, "PATH": PATH, **self.environment}
        pairs = [f"{name}={value}" for name, value in environment.items()]
        words = [os.fspath(word) for word in command]
        return [*self._entering(root), "env", "-i", "-C", str(self.home), *pairs, *words]

    def _entering(self, root: bool) -> list[str]:
        if not self.network:
            return []
        enter = ["nsenter", "-t", str(self.init.pid), "-n", "-m", "-u", "--"]
        as_user = ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups", "--"]
        return enter if root else enter + as_user

    def run(
        self, argv: Sequence[str | os.PathLike[str]], *, root: bool = False, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end on the host, without SSH; it ends with us at the latest."""
        # On loopback nothing else would end it with us; in namespaces the fleet does.
        bound = [] if self.network else ["setpriv", "--pdeathsig", "KILL", "--"]
        return subprocess.run(
            [*bound, *self.argv(*argv, root=root)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=check,
        )  # fmt: skip

    def processes(self, *, sshd: bool = False) -> list[HostProcess]:
        """List what runs on the host, whatever it did to get away; sshd's own only if asked for.

        With namespaces that is all in the host's network and all below its first process; on
        loopback the latter.
        """
        return all_processes([self], sshd=sshd)[self]

    async def wait_empty(self, within: float) -> float:
        """Wait until nothing but sshd runs on the host and return the seconds that took.

        Raises:
            LeakError: something still runs after ``within`` seconds.
        """
        start = trio.current_time()
        while left := self.processes():
            if trio.current_time() - start >= within:
                found = [Leftover("process", p.title, f"on {self.name}", p.pid) for p in left]
                raise LeakError(found, within)
            await trio.sleep(POLL)
        return trio.current_time() - start

    # its sshd -----------------------------------------------------------------------------------
    def sessions(self) -> list[HostProcess]:
        """List the sshd processes of all connections, not the listener."""
        return [one for one in self.processes(sshd=True) if self.is_session(one)]

    def is_session(self, process: HostProcess) -> bool:
        return _is_sshd(process.pid) and process.pid != read_pid(self.place)

    def kill_sessions(self) -> int:
        """Kill -9 the sshd processes of all connections, not the listener; return how many."""
        return sum(process.signal() for process in self.sessions())

    def stop_sshd(self) -> None:
        """Kill -9 the listener: nobody can connect any more, connections go on."""
        if listener := identify(read_pid(self.place)):
            guard.send_signal(listener.pid, listener.start, signal.SIGKILL)
            _wait_for(lambda: not self.listens(), f"sshd of {self.name} does not end")

    def start_sshd(self) -> None:
        """Start the listener again, if it does not run."""
        guard.send_signal(self.init.pid, self.init.start, START_SSHD)
        _wait_for(self.listens, f"sshd of {self.name} does not start; see {self.log}")

    def listens(self) -> bool:
        """Tell whether its sshd runs."""
        listener = identify(read_pid(self.place))
        return listener is not None and is_running(listener)

    # its network --------------------------------------------------------------------------------
    def partition(self, *directions: Direction) -> None:
        """Cut the host off, without a sign to either side; `heal` ends it.

        Args:
            directions: ``to`` for what is sent to the host, ``from`` for what it sends; none means
                both.

        Raises:
            MachineError: it cannot be cut off, see `why_no_partition`.
        """
        self._check_cable()
        self.link.cut_off(frozenset(directions or BOTH))

    def heal(self) -> None:
        """End a partition, at once; where there can be none, there is none to end."""
        if self.can_partition:
            self.link.cut_off(frozenset())

    def impair(self, *, delay: float = 0.0, loss: float = 0.0) -> None:
        """Delay all it sends and receives by ``delay`` seconds, lose a share ``loss`` of it.

        Raises:
            MachineError: see `why_no_partition`.
        """
        self._check_cable()
        self.link.impair(delay, loss)

    def _check_cable(self) -> None:
        if self.why_no_partition:
            raise MachineError(
                f"the network of {self.name} cannot be cut: {self.why_no_partition}",
                hint="run the tests as root",
            )


def all_processes(hosts: Iterable[Host], *, sshd: bool = False) -> dict[Host, list[HostProcess]]:
    """Do as `Host.processes` for many hosts in one look."""
    stats = {pid: stat for pid, stat in scan().items() if not stat.is_zombie}
    in_network: dict[int, set[int]] = {}
    for pid in stats:
        in_network.setdefault(namespaces.network_of(pid), set()).add(pid)
    return {host: list(_found_on(host, stats, in_network, sshd)) for host in hosts}


def _found_on(
    host: Host, stats: Mapping[int, Stat], in_network: Mapping[int, set[int]], sshd: bool
) -> Iterator[HostProcess]:
    there = in_network.get(host.network, set()) if host.network else set()
    boot = boot_id()
    for pid in sorted({*descendants(host.init.pid, stats), *there} - {host.init.pid}):
        if (stat := stats.get(pid)) and (sshd or not _is_sshd(pid)):
            yield HostProcess(Identity(pid, stat.start, boot), stat.parent, title_of(pid))


def _is_sshd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("sshd")
    except OSError:  # it has just ended: nothing that is left
        return True


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"{' '.join(argv)} failed: {done.stderr.strip()}")


def _wait_for(happened: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + WAIT_LIMIT
    while not happened():
        if time.monotonic() > until:
            raise MachineError(otherwise)
        time.sleep(POLL)
