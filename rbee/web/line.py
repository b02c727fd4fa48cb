"""A TCP connection of ours, without a task switch where nothing has to be waited for.

trio's own streams let all other tasks run at each call, which costs as much as all that a short
request needs beside it. Whoever only uses these must wait for something now and then.
"""

from __future__ import annotations

import os
import socket
from errno import EINPROGRESS

import trio

PIECE = 1 << 16


class Line:
    """A connection by its descriptor, which does not block; `close` is for who has no stream of it.

    Both calls raise `OSError` if the connection is broken.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    async def receive(self) -> bytes:
        """Wait for what comes, b"" at the end; always a checkpoint."""
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                return os.read(self._fd, PIECE)
            except BlockingIOError:
                continue

    async def send(self, data: bytes) -> None:
        """Send all; a checkpoint only where the peer has to be waited for."""
        sent = self.put(data)
        if sent == len(data):
            return
        left = memoryview(data)[sent:]
        while left:
            await trio.lowlevel.wait_writable(self._fd)
            left = left[self.put(left) :]

    def put(self, data: bytes | memoryview) -> int:
        """Send what can be sent at once; return how much that was."""
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        os.close(self._fd)


async def open_line(host: str, port: int) -> Line:
    """Connect; `Line.close` is the caller's.

    Raises:
        OSError: nobody answers there.
    """
    family = _family(host)
    if family is None:
        stream = await trio.open_tcp_stream(host, port)
        return Line(stream.socket.detach())
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = sock.connect_ex((host, port))
        if error == EINPROGRESS:
            await trio.lowlevel.wait_writable(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        return Line(sock.detach())


def _family(host: str) -> socket.AddressFamily | None:
    """Return the family of an address, None of a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family
    return None
