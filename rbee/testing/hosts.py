"""Throw-away hosts with real sshd, to test against what a network and other machines do.

    with open_hosts_sync("mac", "linux") as hosts:
        subprocess.run(["ssh", "-F", hosts.ssh_config, "mac", "uname"])
        hosts["mac"].partition()

As root, each host is a set of kernel namespaces: an address and a host name of its own, a user
``node`` that the machine does not know (its user files are covered inside the host only, so
nobody is added anywhere), an empty /run. The file system, and with it this Python, is shared.
Without root, or where the kernel refuses, each host is an sshd on a loopback address that lets in
the current user, with another ``HOME``: no partitions, `Host.why_whole` says why.

A guard holds the hosts. When whoever opened them ends, even by ``kill -9``, it ends every process
in them and removes their files; the interfaces go with the namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import attrs
import trio

from rbee import guard
from rbee.errors import BadInputError, MachineError
from rbee.model import node_name
from rbee.process import GUARD
from rbee.testing import namespaces
from rbee.testing.fleet import Layout, Order, Report
from rbee.testing.host_init import START_SSHD, read_pid
from rbee.testing.processes import (
    Identity,
    Stat,
    boot_id,
    descendants,
    identify,
    is_running,
    scan,
    title_of,
)
from rbee.testing.sshd import PACKAGES, Place, find_program, hashed_known_hosts, known_hosts

OPEN_LIMIT = 30.0
GRACE = 3.0
WAIT_LIMIT = 10.0
POLL = 0.005
PATH = "/usr/local/bin:/usr/bin:/bin"
MAX_HOSTS = 200

Direction = Literal["to", "from"]
BOTH: tuple[Direction, ...] = ("to", "from")


def why_no_hosts() -> str:
    """Return why this machine can open no host at all, "" if it can; for a test to skip with."""
    if missing := [
        name for name in ("sshd", "ssh", "ssh-keygen", "setpriv") if not find_program(name)
    ]:
        return f"{' and '.join(missing)} not found (to have them: {PACKAGES})"
    if os.geteuid() == 0 and not Path("/run/sshd").is_dir():
        # Its own file system has one; a root's sshd on loopback has none.
        return namespaces.why_none()
    return ""


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
    shape: str = ""
    cut: frozenset[Direction] = frozenset()

    def set(self, cut: frozenset[Direction], shape: str) -> None:
        for direction, (pid, interface) in self.ends.items():
            # A black hole swallows silently: no RST, no FIN, no error for who sends.
            queue = "blackhole" if direction in cut else shape or "pfifo"
            in_network = ["nsenter", "-t", str(pid), "-n", find_program("tc")]
            _must([*in_network, "qdisc", "replace", "dev", interface, "root", *queue.split()])
        self.cut, self.shape = cut, shape


@attrs.frozen(eq=False)
class Host:
    """One throw-away host. All methods are quick and synchronous, except `run`.

    Attributes:
        user: whom its sshd lets in with `key`.
        home: where this user is at home.
        known_hosts: the host's line for a known_hosts file.
        hashed_known_hosts: the same, its names hashed.
        can_partition: whether its network can be cut.
        why_whole: why not, "" if it can; for a test to skip with.
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
    why_whole: str
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
        return not self.why_whole

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
        stats = scan()
        found = {*descendants(self.init.pid, stats), *self._in_network(stats)} - {self.init.pid}
        boot = boot_id()
        return [
            HostProcess(Identity(pid, stat.start, boot), stat.parent, title_of(pid))
            for pid in sorted(found)
            if (stat := stats.get(pid)) and not stat.is_zombie and (sshd or not _is_sshd(pid))
        ]

    def _in_network(self, stats: Mapping[int, Stat]) -> set[int]:
        if not self.network:
            return set()
        return {pid for pid in stats if namespaces.network_of(pid) == self.network}

    # its sshd -----------------------------------------------------------------------------------
    def kill_sessions(self) -> int:
        """Kill -9 the sshd processes of all connections, not the listener; return how many."""
        listener = read_pid(self.place)
        found = [p for p in self.processes(sshd=True) if _is_sshd(p.pid) and p.pid != listener]
        return sum(process.signal() for process in found)

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
            MachineError: it cannot be cut off, see `why_whole`.
        """
        self._change(frozenset(directions or BOTH), self.link.shape)

    def heal(self) -> None:
        """End a partition, at once."""
        self._change(frozenset(), self.link.shape)

    def impair(self, *, delay: float = 0.0, loss: float = 0.0) -> None:
        """Delay all it sends and receives by ``delay`` seconds, lose a share ``loss`` of it.

        Raises:
            MachineError: the kernel has no ``netem``, or see `why_whole`.
        """
        shape = f"netem delay {delay * 1000:g}ms loss {loss * 100:g}%" if delay or loss else ""
        self._change(self.link.cut, shape)

    def _change(self, cut: frozenset[Direction], shape: str) -> None:
        if self.why_whole:
            raise MachineError(
                f"the network of {self.name} cannot be cut: {self.why_whole}",
                hint="run the tests as root",
            )
        self.link.set(cut, shape)


@attrs.frozen(eq=False)
class Hosts(Mapping[str, Host]):
    """The hosts of one `open_hosts`, by name.

    Attributes:
        address: where the hosts see whoever opened them.
        key: the private key that they all let in.
        ssh_config: names them all, for ``ssh -F``.
        known_hosts, hashed_known_hosts: files with the keys of them all.
    """

    address: str
    directory: Path
    key: Path
    ssh_config: Path
    known_hosts: Path
    hashed_known_hosts: Path
    _hosts: Mapping[str, Host]

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    def ssh(self, name: str, *command: str) -> list[str]:
        """Return the command line that runs ``command`` on a host over SSH."""
        return ["ssh", "-F", str(self.ssh_config), name, *command]


@contextmanager
def open_hosts_sync(
    *names: str,
    namespaces: bool | None = None,
    environment: Mapping[str, str] | None = None,
    readable: Sequence[Path] = (),
) -> Iterator[Hosts]:
    """Own hosts with these names while the body runs.

    Args:
        namespaces: True for network namespaces or an error, False for loopback, None for
            namespaces if possible.
        environment: what each login finds in its environment.
        readable: directories that every user of the hosts must be able to read, beside those of
            this Python and what it imports from.

    Raises:
        MachineError: this machine cannot; see `why_no_hosts`.
    """
    if why := why_no_hosts():
        raise MachineError(why)
    directory = Path("/tmp", f"rbee-hosts-{secrets.token_hex(4)}")
    order = Order(
        str(directory), _checked(names), namespaces, _quotable(environment or {}),
        [str(path) for path in (*_imported_from(), *readable) if path.is_dir()],
    )  # fmt: skip
    with _open_fleet(order) as report:
        yield _hosts(Layout(directory), report, order.environment)


@asynccontextmanager
async def open_hosts(
    *names: str,
    namespaces: bool | None = None,
    environment: Mapping[str, str] | None = None,
    readable: Sequence[Path] = (),
) -> AsyncGenerator[Hosts, None]:
    """Do as `open_hosts_sync`, without holding up trio."""
    manager = open_hosts_sync(
        *names, namespaces=namespaces, environment=environment, readable=readable
    )
    hosts = await trio.to_thread.run_sync(manager.__enter__)
    try:
        yield hosts
    finally:
        # Bounded: by the guard's grace.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(manager.__exit__, None, None, None)


def _checked(names: Sequence[str]) -> list[str]:
    found = [node_name(name) for name in names]
    if len(set(found)) != len(found) or not 0 < len(found) <= MAX_HOSTS:
        raise BadInputError(f"expected 1 to {MAX_HOSTS} names, each once, got {list(names)}")
    return [str(name) for name in found]


def _quotable(environment: Mapping[str, str]) -> dict[str, str]:
    for name, value in environment.items():
        if set(name + value) & set('"\\\n'):
            raise BadInputError(f"sshd cannot set {name}: it has a quote, backslash or line end")
    return dict(environment)


def _imported_from() -> list[Path]:
    prefixes = (sys.base_prefix, sys.prefix, *filter(os.path.isabs, sys.path))
    return [Path(prefix).resolve() for prefix in dict.fromkeys(prefixes)]


# the fleet's process ----------------------------------------------------------------------------
@contextmanager
def _open_fleet(order: Order) -> Iterator[Report]:
    with tempfile.TemporaryFile() as log, _open_guard(log) as popen:
        assert popen.stdin is not None
        plan = {
            "name": "hosts",
            "argv": [sys.executable, "-m", "rbee.testing.fleet"],
            "first": json.dumps(attrs.asdict(order)),
            "grace": GRACE,
            "remove": [order.directory],
        }
        popen.stdin.write(f"start {json.dumps(plan)}\n".encode())
        yield _read_report(popen, log)


@contextmanager
def _open_guard(log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    # No PR_SET_PDEATHSIG: this may be a thread that does not last. The lifeline is enough.
    popen = subprocess.Popen(
        GUARD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
        start_new_session=True,
    )  # fmt: skip
    assert popen.stdin is not None
    assert popen.stdout is not None
    try:
        yield popen
    finally:
        popen.stdin.close()
        popen.stdout.close()
        popen.wait()


def _read_report(popen: subprocess.Popen[bytes], log: IO[bytes]) -> Report:
    assert popen.stdout is not None
    data, until = b"", time.monotonic() + OPEN_LIMIT
    while not data.endswith(b"\n"):
        left = max(0.0, until - time.monotonic())
        readable = select.select([popen.stdout], [], [], left)[0]
        more = os.read(popen.stdout.fileno(), 65536) if readable else b""
        if not more:
            log.seek(0)
            tail = log.read()[-2000:].decode(errors="replace").strip()
            raise MachineError(f"the hosts did not come up within {OPEN_LIMIT:g} s: {tail}")
        data += more
    said: dict[str, Any] = json.loads(data)
    if "error" in said:
        raise MachineError(said["error"], hint=said["hint"])
    return Report(**said)


def _hosts(layout: Layout, report: Report, environment: Mapping[str, str]) -> Hosts:
    hosts = {
        name: _host(layout, report, environment, number)
        for number, (name, *_) in enumerate(report.hosts)
    }
    return Hosts(
        address=report.address, directory=layout.directory, key=layout.key,
        ssh_config=layout.ssh_config, known_hosts=layout.known_hosts,
        hashed_known_hosts=layout.hashed_known_hosts, hosts=hosts,
    )  # fmt: skip


def _host(layout: Layout, report: Report, environment: Mapping[str, str], number: int) -> Host:
    name, address, port, pid = report.hosts[number]
    place = layout.place(name, address, port)
    init = identify(pid)
    if init is None:
        raise MachineError(f"the first process of host {name} has died")
    ends: dict[Direction, tuple[int, str]] = {
        "to": (report.switch, f"p{number + 2}"),
        "from": (pid, "eth0"),
    }
    return Host(
        place=place, user=report.user, uid=report.uid, gid=report.gid, home=layout.home(name),
        key=layout.key, known_hosts=known_hosts(place),
        hashed_known_hosts=hashed_known_hosts(place), environment=environment,
        why_whole=report.why_loopback, init=init,
        network=namespaces.network_of(pid) if report.switch else 0,
        link=Link(ends if report.switch else {}),
    )  # fmt: skip


def _is_sshd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("sshd")
    except OSError:
        return False


def _must(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"{' '.join(argv)} failed: {done.stderr.strip()}")


def _wait_for(happened: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + WAIT_LIMIT
    while not happened():
        if time.monotonic() > until:
            raise MachineError(otherwise)
        with contextlib.suppress(InterruptedError):
            time.sleep(POLL)
