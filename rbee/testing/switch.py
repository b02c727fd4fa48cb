"""The network of throw-away hosts: a bridge in a namespace, and one interface outside of it.

That interface is the other end of the bridge's uplink. Its name is made of its network, so two
fleets cannot have the same one; the network is private, and leads nowhere.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from rbee.errors import MachineError
from rbee.testing.namespaces import NEWNET, batch, entered, unshare

ATTEMPTS = 20


@attrs.frozen
class Switch:
    """A network of which number 1 is the machine itself, and the hosts are 2, 3, …

    Attributes:
        network: the first three numbers of all its addresses.
        machine: a descriptor of the machine's own network namespace.
    """

    network: str
    machine: int

    def address(self, number: int) -> str:
        return f"{self.network}.{number}"

    def connect(self, pids: Sequence[int]) -> None:
        """Give each process, in a network namespace of its own, an ``eth0`` in this network."""
        lines = ["link add br0 type bridge", "link set br0 up", "link set up0 master br0 up"]
        for number, pid in enumerate(pids, 2):
            peer = f"name eth0 address {_hardware_address(number)} netns {pid}"
            lines.append(f"link add p{number} type veth peer {peer}")
            lines.append(f"link set p{number} master br0 up")
        batch("ip", lines)
        with entered(self.machine):
            batch("ip", self.interface_lines(1, _uplink(self.network), len(pids)))

    def interface_lines(self, number: int, name: str, hosts: int) -> list[str]:
        """Return what ``ip`` has to do at the end with this number."""
        # The neighbours are written down: a cut is silent then, and over at once when it is healed.
        neighbours = [
            f"neigh add {self.address(other)} lladdr {_hardware_address(other)} "
            f"dev {name} nud permanent"
            for other in range(1, hosts + 2)
            if other != number
        ]
        address = f"addr add {self.address(number)}/24 dev {name}"
        return ["link set lo up", address, f"link set {name} up", *neighbours]

    def unplug(self) -> None:
        """Remove the interface outside at once; by itself the kernel takes its time."""
        batch("ip", ["link del up0"])


def move_into_switch(outside: int) -> Switch:
    """Move this thread into a namespace with an uplink to the one of process ``outside``."""
    machine = os.open(f"/proc/{outside}/ns/net", os.O_RDONLY)
    candidates = [_pick_network() for _ in range(ATTEMPTS)]
    unshare(NEWNET)
    for network in candidates:
        peer = f"name {_uplink(network)} address {_hardware_address(1)} netns {outside}"
        try:
            batch("ip", [f"link add up0 type veth peer {peer}"])
        except OSError as exc:
            if "File exists" not in str(exc):
                raise
        else:
            return Switch(network, machine)
    raise MachineError("found no private network that is free", hint="ip -brief link")


def _uplink(network: str) -> str:
    return "rbee" + network.removeprefix("10.").replace(".", "-")


def _hardware_address(number: int) -> str:
    """Return the address of the interface with this number in its network."""
    return f"02:72:62:65:65:{number:02x}"


def _pick_network() -> str:
    """Return the first three numbers of a private network to which this namespace has no route."""
    taken = list(_routed())
    while True:
        found = f"10.{200 + secrets.randbelow(55)}.{secrets.randbelow(256)}"
        network = ipaddress.ip_network(f"{found}.0/24")
        if not any(network.overlaps(other) for other in taken):
            return found


def _routed() -> Iterator[ipaddress.IPv4Network]:
    for line in Path("/proc/thread-self/net/route").read_text().splitlines()[1:]:
        _, destination, _, _, _, _, _, mask, *_ = line.split()
        network = ipaddress.ip_network(f"{_address(destination)}/{_address(mask)}", strict=False)
        # A whole 10.0.0.0/8 behind a gateway is a way out, and ours is the narrower one.
        if isinstance(network, ipaddress.IPv4Network) and network.prefixlen > 8:
            yield network


def _address(text: str) -> str:
    return str(ipaddress.IPv4Address(struct.pack("=I", int(text, 16))))
