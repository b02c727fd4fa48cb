"""The way that requests and tokens take to a node, tried with a port opened there for a moment."""

from __future__ import annotations

import inspect
import json
import statistics
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import ip_address

import attrs
import trio

from rbee.errors import RbeeError, UnavailableError, leaves
from rbee.model import HIVE_PORT, WORKER_PORT
from rbee.nodes import echo
from rbee.nodes.node import Node, Transport
from rbee.ssh import Connection, RemoteProcess, SshError, Wish, open_remote

PORTS = (HIVE_PORT, *range(WORKER_PORT, WORKER_PORT + 8), 0)  # a firewall may open only ours
REACH = 5.0  # seconds for a port to answer
ROUNDS = 9
PING = b"is anybody there"
ECHO_GRACE = 1.0


@attrs.frozen
class Way:
    """A connection to a port of a node that sends back what it is sent; made by `open_way`.

    Attributes:
        place: where it leads, for people.
    """

    place: str
    _stream: trio.SocketStream
    _closed: Callable[[str], RbeeError]

    async def latency(self) -> str:
        """Measure how long it takes there and back, in words; raise as `open_way`."""
        times = [await self.ping() for _ in range(ROUNDS)]
        milliseconds = statistics.median(times) * 1000
        return f"{milliseconds:.1f} ms, median of {ROUNDS} round trips to {self.place}"

    async def ping(self) -> float:
        begin = trio.current_time()
        with trio.move_on_after(REACH):
            try:
                await self._stream.send_all(PING)
                answer = await self._receive(len(PING))
            except trio.BrokenResourceError:
                answer = b""
            if answer != PING:
                raise self._closed("it hangs up")
            return trio.current_time() - begin
        raise self._closed(f"no answer within {REACH:g} s")

    async def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (more := await self._stream.receive_some(size)):
            data += more
        return data


@asynccontextmanager
async def open_way(node: Node, connection: Connection, python: str) -> AsyncGenerator[Way, None]:
    """Have a port of the node open while the body runs, and go there as its transport says.

    As with hives it is a forward of SSH too where only that leads there.

    Raises:
        UnavailableError: it is not reached.
        SshError: the node opens no port, or its sshd forwards none.
    """
    async with _open_echo(connection, python) as (host, port):
        address = connection.address
        if node.transport is Transport.DIRECT and address and not _is_loopback(host):
            place = f"{address} port {port}"
            async with _open_stream(address, port, place, partial(_blocked, node, port)) as way:
                yield way
            return
        async with connection.open_forward(host, port) as ours:
            place, closed = f"port {port} through SSH", partial(_not_forwarded, connection)
            async with _open_stream("127.0.0.1", ours, place, closed) as way:
                yield way


def _is_loopback(host: str) -> bool:
    return ip_address(host.partition("%")[0]).is_loopback


@asynccontextmanager
async def _open_stream(
    address: str, port: int, place: str, closed: Callable[[str], RbeeError]
) -> AsyncGenerator[Way, None]:
    with trio.move_on_after(REACH) as scope:
        try:
            stream = await trio.open_tcp_stream(address, port)
        except OSError as exc:
            raise closed(_words(exc)) from exc
    if scope.cancelled_caught:
        raise closed(f"no answer within {REACH:g} s, a firewall perhaps")
    async with stream:
        way = Way(place, stream, closed)
        await way.ping()  # that somebody listens does not tell who
        yield way


def _words(exc: OSError) -> str:
    first = next(leaves(exc.__cause__ or exc))  # one per address that was tried
    return getattr(first, "strerror", "") or str(first)


def _blocked(node: Node, port: int, why: str) -> RbeeError:
    return UnavailableError(
        f"port {port} of node {node.name} is not reached from here: {why} (transport direct needs "
        f"ports {HIVE_PORT}, {WORKER_PORT} and up)",
        code="not_reachable",
        hint=f"rbee-keeper node update {node.name} --transport ssh",
        node=node.name,
    )


def _not_forwarded(connection: Connection, why: str) -> RbeeError:
    return SshError(
        f"the sshd of node {connection.node} forwards no port to where a hive would listen: {why}",
        hint=connection.target.sees_forwarding,
        node=connection.node,
    )


@asynccontextmanager
async def _open_echo(connection: Connection, python: str) -> AsyncGenerator[tuple[str, int], None]:
    """Yield where a port of the node sends back what it is sent."""
    argv = [python, "-I", "-S", "-c", inspect.getsource(echo), *map(str, PORTS)]
    wish = Wish(argv, [ECHO_GRACE], connection.lease, bare=True)
    async with open_remote(connection, wish) as process:
        host, port = json.loads(await _first_line(process))
        yield host, port


async def _first_line(process: RemoteProcess) -> bytes:
    said = b""
    while b"\n" not in said:
        more = await process.read()
        if not more:
            status = await process.wait()  # its last words come first
            words = process.channel.stderr.strip().splitlines() or ["(no word)"]
            connection = process.connection
            raise SshError(
                f"no port can be opened on node {connection.node} (code {status}): {words[-1]}",
                hint=f"{connection.target.command} ss -tln",
                node=connection.node,
            )
        said += more
    return said
