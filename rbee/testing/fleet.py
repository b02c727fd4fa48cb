"""The program behind `rbee.testing.hosts`: it makes the hosts, and holds them until it is ended.

    guard ─ rbee-fleet ─ rbee-host mac ─ sshd ─ sessions
                       └ rbee-host linux ─ …

It reads an `Order` from its first line of stdin, prints one line, a `Report` or an error, and ends
with its stdin; the guard around it then kills all that is left below and removes the directory.

With namespaces it sits in one that holds a bridge, the hosts' switch. The only thing outside is
one interface with a private address, the other end of the switch's uplink, whose name is made of
its network: so two fleets cannot have the same one.
"""

from __future__ import annotations

import json
import os
import pwd
import secrets
import signal
import socket
import sys
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

USER = "node"
ATTEMPTS = 20


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


def make(order: Order) -> tuple[Report, list[int]]:
    """Make the hosts; return what was made and their network namespaces."""
    layout = Layout(Path(order.directory))
    layout.directory.mkdir(mode=0o755)
    layout.directory.chmod(0o755)  # whatever the umask: the users of the hosts have homes in it
    why = "asked for" if order.namespaces is False else namespaces.why_none()
    if why and order.namespaces:
        raise MachineError(why)
    network = "" if why else _move_into_switch()
    places = _places(layout, order.names, network)
    for place in places:
        place.directory.mkdir()
    make_keys([layout.key, *(place.host_key for place in places)])
    login = _any_login() if why else _new_login()
    inits = [_start(layout, place, login, order, network) for place in places]
    for init in inits:
        init.expect(APART)
    if network:
        _wire(network, inits)
    for number, init in enumerate(inits):
        lines = _host_lines(network, number + 2, len(inits)) if network else []
        init.channel.send("\n".join(lines).encode() or b"\n")
    _write_client_files(layout, places, login.user)
    for init in inits:
        init.expect(UP)
    report = Report(
        why_loopback=why,
        address=f"{network}.1" if network else "127.0.0.1",
        switch=os.getpid() if network else 0,
        user=login.user, uid=login.uid, gid=login.gid,
        hosts=[(i.place.name, i.place.address, i.place.port, i.pid) for i in inits],
    )  # fmt: skip
    return report, [namespaces.network_of(init.pid) for init in inits] if network else []


# whom they let in -------------------------------------------------------------------------------
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


# where they are ---------------------------------------------------------------------------------
def _places(layout: Layout, names: Sequence[str], network: str) -> list[Place]:
    if network:
        return [layout.place(name, f"{network}.{i}", 22) for i, name in enumerate(names, 2)]
    # An address each, that nobody else has picked: so also their ports are their own.
    loopback = f"127.{1 + secrets.randbelow(254)}.{1 + secrets.randbelow(254)}"
    addresses = [f"{loopback}.{number}" for number in range(2, 2 + len(names))]
    return [
        layout.place(name, address, _free_port(address))
        for name, address in zip(names, addresses, strict=True)
    ]


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _move_into_switch() -> str:
    """Move this process into a namespace with an uplink; return the network that it claimed."""
    machine = os.open("/proc/self/ns/net", os.O_RDONLY)
    namespaces.unshare(namespaces.NEWNET)
    with namespaces.entered(machine):
        candidates = [namespaces.pick_network() for _ in range(ATTEMPTS)]
    os.close(machine)
    address = namespaces.hardware_address(1)
    for network in candidates:
        peer = f"name {_uplink(network)} address {address} netns {os.getppid()}"
        try:
            namespaces.batch("ip", [f"link add up0 type veth peer {peer}"])
        except OSError as exc:
            if "File exists" not in str(exc):
                raise
        else:
            return network
    raise MachineError("found no private network that is free")


def _uplink(network: str) -> str:
    return "rbee" + network.removeprefix("10.").replace(".", "-")


def _wire(network: str, inits: Sequence[Init]) -> None:
    lines = ["link add br0 type bridge", "link set br0 up", "link set up0 master br0 up"]
    for number, init in enumerate(inits, 2):
        peer = f"name eth0 address {namespaces.hardware_address(number)} netns {init.pid}"
        lines += [f"link add p{number} type veth peer {peer}", f"link set p{number} master br0 up"]
    namespaces.batch("ip", lines)
    machine = os.open(f"/proc/{os.getppid()}/ns/net", os.O_RDONLY)
    with namespaces.entered(machine):
        namespaces.batch("ip", _interface_lines(network, 1, _uplink(network), len(inits)))
    os.close(machine)


def _host_lines(network: str, number: int, hosts: int) -> list[str]:
    return ["link set lo up", *_interface_lines(network, number, "eth0", hosts)]


def _interface_lines(network: str, number: int, name: str, hosts: int) -> list[str]:
    # The neighbours are written down: a cut is silent then, and over at once when it is healed.
    return [
        f"addr add {network}.{number}/24 dev {name}",
        f"link set {name} up",
        *(
            f"neigh add {network}.{other} lladdr {namespaces.hardware_address(other)} "
            f"dev {name} nud permanent"
            for other in range(1, hosts + 2)
            if other != number
        ),
    ]


# their life -------------------------------------------------------------------------------------
def _start(layout: Layout, place: Place, login: Login, order: Order, network: str) -> Init:
    home = layout.home(place.name)
    environment = order.environment if network else {"HOME": str(home), **order.environment}
    login = attrs.evolve(login, home=home, environment=environment)
    host_init.make_home(login)
    config = write_sshd_config(place, login, public_key(layout.key))
    isolation = _isolation(place, login, order, network) if network else None
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


def _isolation(place: Place, login: Login, order: Order, network: str) -> Isolation:
    etc = place.directory / "etc"
    etc.mkdir()
    host_init.write_users(etc, login)
    names = ["localhost", "queen", *order.names]
    addresses = ["127.0.0.1", *(f"{network}.{i}" for i in range(1, len(names)))]
    pairs = zip(addresses, names, strict=True)
    (etc / "hosts").write_text("".join(f"{address} {name}\n" for address, name in pairs))
    return Isolation(etc, tuple(Path(path) for path in order.readable))


def _write_client_files(layout: Layout, places: Sequence[Place], user: str) -> None:
    layout.known_hosts.write_text("".join(map(known_hosts, places)))
    layout.hashed_known_hosts.write_text("".join(map(hashed_known_hosts, places)))
    config = ssh_config(places, user=user, key=layout.key, known=layout.known_hosts)
    layout.ssh_config.write_text(config)


def _end(networks: Sequence[int]) -> None:
    """Kill what others started in the hosts: the guard's own sweep sees only what is below it."""
    for network in networks:
        while found := namespaces.members(network):
            for pid in found:
                guard.send_signal(pid, guard.start_time(pid), signal.SIGKILL)
    if networks:
        namespaces.batch("ip", ["link del up0"])  # the kernel's own removal takes its time


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Be the fleet until stdin ends."""
    guard.die_with_guard()
    guard.set_title("rbee-fleet")
    signal.signal(signal.SIGTERM, lambda *_: None)  # the end of stdin, which follows, is enough
    order = Order(**json.loads(sys.stdin.buffer.readline()))
    try:
        if not find_program("sshd"):
            raise MachineError("sshd is missing", hint="apt-get install openssh-server")
        report, networks = make(order)
    except (RbeeError, OSError) as exc:
        _say({"error": str(exc), "hint": getattr(exc, "hint", "")})
        return 1
    _say(attrs.asdict(report))
    sys.stdin.buffer.read()
    _end(networks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
