"""Throw-away hosts with real sshd, to test against what a network and other machines do.

    with open_hosts_sync("mac", "linux") as hosts:
        subprocess.run(["ssh", "-F", hosts.ssh_config, "mac", "uname"])
        hosts["mac"].partition()

As root, each host is a set of kernel namespaces: an address and a host name of its own, a user
``node`` that the machine does not know (its user files are covered inside the host only, so
nobody is added anywhere), an empty /run. The file system, and with it this Python, is shared.
Without root, or where the kernel refuses, each host is an sshd on a loopback address that lets in
the current user, with another ``HOME``: no partitions, `Host.why_no_partition` says why.

A guard holds the hosts. When whoever opened them ends, even by ``kill -9``, it ends every process
in them and removes their files; the interfaces go with the namespaces.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Any

import attrs
import trio

from rbee.errors import BadInputError, MachineError
from rbee.model import node_name
from rbee.process import GUARD
from rbee.testing.fleet import Layout, Order, Report
from rbee.testing.host import Direction, Host, HostProcess, Link
from rbee.testing.namespaces import network_of, why_none
from rbee.testing.processes import identify
from rbee.testing.sshd import PACKAGES, find_program, hashed_known_hosts, known_hosts

__all__ = ["Host", "HostProcess", "Hosts", "open_hosts", "open_hosts_sync", "why_no_hosts"]

OPEN_LIMIT = 30.0
GRACE = 3.0
MAX_HOSTS = 200


def why_no_hosts() -> str:
    """Return why this machine can open no host at all, "" if it can; for a test to skip with."""
    if missing := [
        name for name in ("sshd", "ssh", "ssh-keygen", "setpriv") if not find_program(name)
    ]:
        return f"{' and '.join(missing)} not found (to have them: {PACKAGES})"
    if os.geteuid() == 0 and not Path("/run/sshd").is_dir():
        # With namespaces a host has its own /run; on loopback root's sshd needs the machine's.
        return why_none()
    return ""


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
            "die_with_guard": True,
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
            raise MachineError(f"the hosts did not come up: {tail}")
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
        why_no_partition=report.why_loopback, init=init,
        network=network_of(pid) if report.switch else 0,
        link=Link(ends if report.switch else {}),
    )  # fmt: skip
