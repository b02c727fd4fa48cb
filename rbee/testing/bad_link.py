"""A bad cable in user space, for kernels without netem: frames come late, or not at all.

It is spliced in between a host's port and the switch: the port leaves the bridge, and what arrives
at it goes through this program to a new port of the bridge, and back. It runs in the namespace of
the switch and ends with whoever started it.

    python -m rbee.testing.bad_link PORT OTHER DELAY LOSS
"""

from __future__ import annotations

import heapq
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import attrs

from rbee.errors import MachineError
from rbee.testing.sshd import find_program

SOL_PACKET, PACKET_VNET_HDR, PACKET_OUTGOING, ALL_PROTOCOLS = 263, 15, 4, 3
FRAME = 1 << 17  # the biggest that is handed over unsegmented, and its header
READY = b"up\n"


@attrs.define(eq=False)
class BadLink:
    """The cable of one port, in the namespace of process ``switch``."""

    switch: int
    port: str
    _popen: subprocess.Popen[bytes]

    @classmethod
    def splice(cls, switch: int, port: str, *, delay: float, loss: float) -> BadLink:
        """Put it in.

        Raises:
            MachineError: the interfaces cannot be made.
        """
        inner, outer = _names(port)
        _batch(switch, [
            f"link add {outer} type veth peer name {inner}",
            f"link set {inner} up promisc on",
            f"link set {port} promisc on",
        ])  # fmt: skip
        enter = ["nsenter", "-t", str(switch), "-n", "setpriv", "--pdeathsig", "KILL", "--"]
        program = [sys.executable, "-m", "rbee.testing.bad_link"]
        popen = subprocess.Popen(
            [*enter, *program, port, inner, str(delay), str(loss)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert popen.stdout is not None
        if popen.stdout.readline() != READY:
            raise MachineError(f"the bad cable of {port} does not start")
        _batch(switch, [f"link set {port} nomaster", f"link set {outer} up master br0"])
        return cls(switch, port, popen)

    def remove(self) -> None:
        """Put the good one back, at once: what is under way is lost."""
        self._popen.kill()
        self._popen.communicate()
        outer = _names(self.port)[1]
        _batch(self.switch, [f"link del {outer}", f"link set {self.port} promisc off master br0"])


def _names(port: str) -> tuple[str, str]:
    return f"i{port}", f"o{port}"


def _batch(switch: int, lines: Sequence[str]) -> None:
    done = subprocess.run(
        ["nsenter", "-t", str(switch), "-n", find_program("ip"), "-batch", "-"],
        input="\n".join(lines) + "\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise MachineError(f"ip {lines} failed: {done.stderr.strip()}")


# the program ------------------------------------------------------------------------------------
def forward(left: socket.socket, right: socket.socket, delay: float, loss: float) -> None:
    """Carry frames both ways for ever."""
    others = {left: right, right: left}
    due: list[tuple[float, int, socket.socket, bytes]] = []
    number = 0
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        for one in select.select([left, right], [], [], wait)[0]:
            frame, address = one.recvfrom(FRAME)
            # What is sent here shows here as well.
            if address[2] != PACKET_OUTGOING and random.random() >= loss:
                number += 1
                heapq.heappush(due, (time.monotonic() + delay, number, others[one], frame))
        while due and due[0][0] <= time.monotonic():
            _send(*heapq.heappop(due)[2:])


def _send(out: socket.socket, frame: bytes) -> None:
    try:
        out.send(frame)
    except OSError:  # the interface is gone, or full: a frame less
        return


def _open(interface: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    # With its header a frame stays as the kernel had it: unsegmented, its checksum still to do.
    opened.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    opened.bind((interface, ALL_PROTOCOLS))
    return opened


def main(port: str, other: str, delay: str, loss: str) -> None:
    left, right = _open(port), _open(other)
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    forward(left, right, float(delay), float(loss))


if __name__ == "__main__":
    main(*sys.argv[1:])
