"""The program behind `rbee.testing.hosts`: it makes the hosts, and holds them until it is ended.

    guard ─ rbee-fleet ─ rbee-host mac ─ sshd ─ sessions
                       └ rbee-host linux ─ …

It reads an `Order` from its first line of stdin, prints one line, a `Report` or an error, and ends
with its stdin; the guard around it then kills all that is left below and removes the directory.

With namespaces it sits in the one of the hosts' switch.
"""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from rbee import guard
from rbee.errors import MachineError, RbeeError
from rbee.testing import host_init, namespaces
from rbee.testing.host_init import APART, FAILED, UP, Isolation
from rbee.testing.sshd import (
    Login,
    Place,
    find_program,
    hashed_known_hosts,
    known_hosts,
    make_keys,
    public_key,
    ssh_config,
    write_sshd_config,
)
from rbee.testing.switch import Switch, move_into_switch

USER = "node"
NOTHING = b"\n"  # an empty message would be the end of the channel


@attrs.frozen
class Order:
    """Which hosts to make.

    Attributes:
        namespaces: whether they are network namespaces; None for "if possible".
        environment: what every login finds in its environment.
        readable: directories that every user of the hosts must be able to read.
    """

    directory: str
    names: list[str]
    namespaces: bool | None
    environment: dict[str, str]
    readable: list[str]


@attrs.frozen
class Report:
    """What was made.

    Attributes:
        why_loopback: why these are no network namespaces, "" if they are.
        address: where the hosts see whoever ordered them.
        switch: the process whose network namespace holds one port ``p<n>`` per host.
        hosts: name, address, port and first process of each.
    """

    why_loopback: str
    address: str
    switch: int
    user: str
    uid: int
    gid: int
    hosts: list[tuple[str, str, int, int]]


@attrs.frozen
class Layout:
    """The files of a fleet, which both sides know."""

    directory: Path

    @property
    def key(self) -> Path:
        return self.directory / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    @property
    def hashed_known_hosts(self) -> Path:
        return self.directory / "known_hosts.hashed"

    @property
    def ssh_config(self) -> Path:
        return self.directory / "ssh_config"

    def place(self, name: str, address: str, port: int) -> Place:
        return Place(name, address, port, self.directory / name)

    def home(self, name: str) -> Path:
        return self.directory / name / "home"


@attrs.frozen
class Init:
    """A host's first process, as its parent sees it."""

    place: Place
    pid: int
    channel: socket.socket

    def expect(self, word: bytes) -> None:
        answer = self.channel.recv(1 << 16)
        if answer != word:
            text = answer.removeprefix(FAILED).decode() or "its first process has died"
            raise MachineError(f"cannot make host {self.place.name}: {text}")


@attrs.frozen(eq=False)
class Fleet:
    """The hosts and what they are made of."""

    order: Order
    layout: Layout
    login: Login
    places: Sequence[Place]
    switch: Switch | None
    inits: list[Init] = attrs.field(factory=list)
    networks: list[int] = attrs.field(factory=list)

    def make(self) -> None:
        """Make all that there is of the hosts; all listen when this returns."""
        for place in self.places:
            place.directory.mkdir()
        make_keys([self.layout.key, *(place.host_key for place in self.places)])
        self._write_client_files()
        self._start_all()
        self._connect()

    def report(self, why_loopback: str) -> Report:
        return Report(
            why_loopback=why_loopback,
            address=self.switch.address(1) if self.switch else "127.0.0.1",
            switch=os.getpid() if self.switch else 0,
            user=self.login.user, uid=self.login.uid, gid=self.login.gid,
            hosts=[(i.place.name, i.place.address, i.place.port, i.pid) for i in self.inits],
        )  # fmt: skip

    def end(self) -> None:
        """Kill what others started in the hosts: the guard around us sees only what is below it."""
        if self.switch is None:
            return
        for network in self.networks:
            while found := namespaces.members(os.fstat(network).st_ino):
                for pid in found:
                    guard.send_signal(pid, guard.start_time(pid), signal.SIGKILL)
                time.sleep(0.002)
        self.switch.unplug()

    def _start_all(self) -> None:
        for place in self.places:
            self.inits.append(self._start(place))
        for init in self.inits:
            init.expect(APART)

    def _connect(self) -> None:
        count = len(self.inits)
        if self.switch:
            self.switch.connect([init.pid for init in self.inits])
            # Held open: the number of a network is not given to another one while we look for it.
            for init in self.inits:
                self.networks.append(os.open(f"/proc/{init.pid}/ns/net", os.O_RDONLY))
        for number, init in enumerate(self.inits, 2):
            lines = self.switch.interface_lines(number, "eth0", count) if self.switch else []
            init.channel.send("\n".join(lines).encode() or NOTHING)
        for init in self.inits:
            init.expect(UP)

    def _write_client_files(self) -> None:
        layout, places = self.layout, self.places
        layout.known_hosts.write_text("".join(map(known_hosts, places)))
        layout.hashed_known_hosts.write_text("".join(map(hashed_known_hosts, places)))
        layout.ssh_config.write_text(
            ssh_config(places, user=self.login.user, key=layout.key, known=layout.known_hosts)
        )

    def _start(self, place: Place) -> Init:
        login = self._login_at(place)
        host_init.make_home(login)
        config = write_sshd_config(place, login, public_key(self.layout.key))
        isolation = self._isolation(place, login) if self.switch else None
        ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        parent = os.getpid()
        if pid := os.fork():
            theirs.close()
            return Init(place, pid, ours)
        try:
            host_init.run(place, config, theirs, isolation, parent)
        except BaseException as exc:
            theirs.send(FAILED + str(exc).encode()[:60000])
        finally:
            os._exit(1)

    def _login_at(self, place: Place) -> Login:
        home, environment = self.layout.home(place.name), self.order.environment
        if not self.switch:  # this user has a home already, which is not to be touched
            environment = {"HOME": str(home), **environment}
        return attrs.evolve(self.login, home=home, environment=environment)

    def _isolation(self, place: Place, login: Login) -> Isolation:
        assert self.switch is not None
        etc = place.directory / "etc"
        etc.mkdir()
        host_init.write_users(etc, login)
        known = {"localhost": "127.0.0.1", "queen": self.switch.address(1)}
        known |= {other.name: other.address for other in self.places}
        (etc / "hosts").write_text("".join(f"{at} {name}\n" for name, at in known.items()))
        return Isolation(etc, tuple(Path(path) for path in self.order.readable))


def make(order: Order) -> tuple[Fleet, Report]:
    """Make the hosts that were ordered; all listen when this returns."""
    if not find_program("sshd"):
        raise MachineError("sshd is missing", hint="apt-get install openssh-server")
    why = "asked for" if order.namespaces is False else namespaces.why_none()
    if why and order.namespaces:
        raise MachineError(why)
    layout = Layout(Path(order.directory))
    layout.directory.mkdir()
    layout.directory.chmod(0o755)  # whatever the umask: the users of the hosts have homes in it
    login = _any_login() if why else _new_login()
    switch = None if why else move_into_switch(outside=os.getppid())
    fleet = Fleet(order, layout, login, _places(layout, order.names, switch), switch)
    try:
        fleet.make()
    except BaseException:
        fleet.end()
        raise
    return fleet, fleet.report(why)


def _any_login() -> Login:
    """Return the user who runs this: without root, sshd lets in nobody else."""
    if os.geteuid() == 0 and not Path("/run/sshd").is_dir():
        raise MachineError("sshd as root needs /run/sshd", hint="mkdir -m 755 /run/sshd")
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        raise MachineError(f"no user of this machine has the number {os.getuid()}") from None
    return Login(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(), {})


def _new_login() -> Login:
    uid = host_init.free_uid()
    return Login(USER, uid, uid, Path(), {})


def _places(layout: Layout, names: Sequence[str], switch: Switch | None) -> list[Place]:
    if switch:
        return [layout.place(name, switch.address(i), 22) for i, name in enumerate(names, 2)]
    # A network each, that nobody else has picked: so also their ports are their own.
    network = f"127.{1 + secrets.randbelow(254)}.{1 + secrets.randbelow(254)}"
    addresses = [f"{network}.{number}" for number in range(2, 2 + len(names))]
    return [
        layout.place(name, address, _free_port(address))
        for name, address in zip(names, addresses, strict=True)
    ]


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Be the fleet until stdin ends."""
    guard.set_title("rbee-fleet")
    signal.signal(signal.SIGTERM, lambda *_: None)  # the end of stdin, which follows, is enough
    order = Order(**json.loads(sys.stdin.buffer.readline()))
    try:
        fleet, report = make(order)
    except (RbeeError, OSError) as exc:
        _say({"error": str(exc), "hint": getattr(exc, "hint", "")})
        return 1
    _say(attrs.asdict(report))
    sys.stdin.buffer.read()
    fleet.end()
    if fleet.switch:
        _remove_runs(fleet.login.uid)
    return 0


def _remove_runs(uid: int) -> None:
    """Remove the run directories of a user whom only the hosts knew: /tmp is the machine's."""
    for run in Path("/tmp").glob(f"rbee-{uid}-*"):
        shutil.rmtree(run, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
