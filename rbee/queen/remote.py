"""Registered nodes as machines of the queen: their hives over SSH.

What is started here ends with the connection, or by its lease; a node that fell silent is fenced
until then. Loaded when the first such node is used: asyncssh takes its time.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import attrs
import trio

from rbee import __version__
from rbee.aio import Aio, open_aio
from rbee.errors import ConflictError, RbeeError
from rbee.nodes.node import Node, Transport
from rbee.nodes.probe import probe_node
from rbee.nodes.target import target_of
from rbee.queen.machine import FoundHive, Machine, OwnedHive, QueenSetup
from rbee.ssh import (
    Connection,
    Fence,
    RemoteProgramError,
    Sight,
    SshError,
    look,
    open_connection,
    open_remote_daemon,
)
from rbee.wire.messages import DaemonStart, Narration

__all__ = ["Remote", "RemoteMachine", "open_aio"]

log = logging.getLogger(__name__)

Narrate = Callable[[Narration], None]


class Remote:
    """The SSH side of one queen."""

    def __init__(self, setup: QueenSetup, aio: Aio) -> None:
        self._setup = setup
        self.aio = aio
        self._fences: dict[str, Fence] = {}

    def fenced_for(self, name: str) -> float:
        """Return the seconds in which something of a lost hive may still run on a node."""
        fence = self._fences.get(name)
        if fence is None or not fence.closed:  # none was lost: it runs, or just starts
            return 0.0
        return max(0.0, fence.lifted_at - trio.current_time())

    async def probe(self, node: Node) -> dict[str, Any]:
        """Log in to a node and return what it has; raise as `rbee.nodes.probe.probe_node`."""
        return await probe_node(node, self.aio, partial(log.info, "%s %s"))

    @asynccontextmanager
    async def open(self, node: Node, narrate: Narrate) -> AsyncGenerator[Machine, None]:
        """Connect to a node while the body runs, once nothing of a lost hive is left there.

        Raises:
            SshError: it is not reached, or cannot be used, in words.
        """
        await self._until_clean(node.name, narrate)
        narrate(Narration("queen", "connect", f"to {node.name} ({node.address})"))
        fence = self._fences[node.name] = Fence()
        lease = self._setup.lease
        async with (
            open_connection(target_of(node), self.aio, lease=lease, fence=fence) as connection,
            AsyncExitStack() as forwards,
        ):
            sight = await look(connection, f"{node.rbee_path}/rbee-hive", env=node.environment)
            narrate(Narration("queen", "preflight", f"{node.name} has {_in_words(sight)}"))
            yield RemoteMachine(self._setup, node, connection, sight, forwards)

    async def _until_clean(self, name: str, narrate: Narrate) -> None:
        left = self.fenced_for(name)
        if left > 0:
            why = f"{left:.0f} s until nothing of the hive that was lost on {name} can be left"
            narrate(Narration("queen", "wait", why))
            await trio.sleep(left)


def _in_words(sight: Sight) -> str:
    python = f"Python {'.'.join(map(str, sight.version))}"
    return f"rbee {sight.rbee or '(of some version)'}, {python}" if sight.program else python


@attrs.define(eq=False)
class RemoteMachine:
    """One connected node. What is forwarded stays so until it is left."""

    _setup: QueenSetup
    _node: Node
    _connection: Connection
    _sight: Sight
    _forwards: AsyncExitStack

    async def find_hive(self) -> FoundHive | None:
        found = self._sight.hive
        return FoundHive(found.run_file, found.token) if found else None

    @asynccontextmanager
    async def open_hive(self, start: DaemonStart) -> AsyncGenerator[OwnedHive, None]:
        """Own a hive there while the body runs.

        Raises:
            RemoteProgramError: there is no rbee.
            ConflictError: there is one of another version.
            RbeeError: as `rbee.ssh.open_remote_daemon`.
        """
        node, setup = self._node, self._setup
        self._check_program()
        argv = [
            f"{node.rbee_path}/rbee-hive", "daemon", "--owned", "--node", node.name,
            "--port", str(setup.hive_port),
        ]  # fmt: skip
        async with open_remote_daemon(
            self._connection, argv, start,
            graces=[setup.grace.guard_a, setup.grace.guard_b],
            log_file=f"hive-{node.name}.log",
            env={**node.environment, "RBEE_NONCE": setup.nonce, "SPT_NOENV": "1"},
            adopt_grace=setup.grace.worker_guard + 1,
            reachable=node.transport is Transport.DIRECT,
        ) as daemon:  # fmt: skip
            yield daemon

    def _check_program(self) -> None:
        node, sight = self._node, self._sight
        hint = f"rbee-keeper node install {node.name}"
        if not sight.program:
            raise RemoteProgramError(
                f"node {node.name} has no {node.rbee_path}/rbee-hive", hint=hint, node=node.name
            )
        if sight.rbee not in ("", __version__):
            raise ConflictError(
                f"node {node.name} has rbee {sight.rbee} at {sight.program}, this queen is of "
                f"{__version__}",
                code="other_version",
                hint=hint,
            )

    async def via(self, url: str) -> str:
        """Return an address of ours: direct, or a forward of SSH where only that leads there."""
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        address = self._connection.address
        if self._node.transport is Transport.SSH or not address or _is_loopback(host):
            inner = "127.0.0.1" if _is_any(host) else host
            there = self._connection.open_forward(inner, port)
            return f"http://127.0.0.1:{await self._enter(there)}"
        return f"http://{_bracketed(address)}:{port}"

    async def queen_url(self, url: str) -> str:
        """Return the node's address for our ``url``: a forward back, if we listen on loopback."""
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        if not (_is_loopback(host) or _is_any(host)):
            return url
        inner = "127.0.0.1" if _is_any(host) else host
        try:
            there = await self._enter(self._connection.open_reverse_forward(inner, port))
        except SshError as exc:  # the hive's news tells the queen as well
            log.warning("node %s cannot call the queen back: %s", self._node.name, exc)
            return ""
        return f"http://127.0.0.1:{there}"

    async def wait_lost(self) -> RbeeError:
        return await self._connection.wait_lost()

    async def _enter(self, forward: AbstractAsyncContextManager[int]) -> int:
        return await self._forwards.enter_async_context(forward)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or _address_is(host, "is_loopback")


def _is_any(host: str) -> bool:
    return _address_is(host, "is_unspecified")


def _address_is(host: str, what: str) -> bool:
    try:
        return bool(getattr(ip_address(host), what))
    except ValueError:
        return False


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
