"""The nodes of one queen: its own machine and the registered ones, connected when needed."""

from __future__ import annotations

import importlib
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from rbee.errors import RbeeError
from rbee.model import LOCALHOST
from rbee.nodes.node import Node, NodeStatus
from rbee.nodes.store import NodeStore
from rbee.queen.machine import FirstHive, LocalMachine, Machine, QueenSetup
from rbee.scopes import TaskOwner
from rbee.wire.messages import DaemonStart, Narration

if TYPE_CHECKING:
    from rbee.queen.remote import Remote

log = logging.getLogger(__name__)

Narrate = Callable[[Narration], None]


class Machines(TaskOwner):
    """Opens nodes by name. SSH is loaded with the first node that needs it."""

    def __init__(self, setup: QueenSetup, first: FirstHive | None = None) -> None:
        self._setup = setup
        self._first = first
        self.store = NodeStore.of(setup.home)
        self._remote: Remote | None = None
        self._loading = trio.Lock()
        self._noting = trio.Lock()  # in the order in which it happened
        self._lasting = trio.CancelScope(shield=True)

    async def check(self, name: str) -> None:
        """Raise `NotFoundError` if there is no node of that name."""
        if name != LOCALHOST:
            await self.store.get(name)

    @asynccontextmanager
    async def connect(self, name: str, narrate: Narrate) -> AsyncGenerator[Machine, None]:
        """Connect to a node while the body runs.

        Raises:
            NotFoundError: there is no such node.
            SshError: it is not reached, or cannot run a hive, in words.
        """
        if name == LOCALHOST:
            yield LocalMachine(self._setup, self._first)
            return
        node = await self.store.get(name)
        async with (await self.ssh()).open(node, narrate) as machine:
            yield machine

    def begun(self, name: str) -> DaemonStart | None:
        """Return how the hive was started that is on its way to a node and that nobody has yet."""
        first = self._first if name == LOCALHOST else None
        return first.start if first is not None and not first.is_taken else None

    async def probe(self, node: Node) -> dict[str, Any]:
        """Log in to a node that is not registered yet and return what it has."""
        return await (await self.ssh()).probe(node)

    def fenced_for(self, name: str) -> float:
        """Return the seconds in which something of a lost hive may still run on a node."""
        return self._remote.fenced_for(name) if self._remote else 0.0

    async def note(self, name: str, error: BaseException | None) -> None:
        """Note in the registry that a node is ready, or why it is not."""
        if name == LOCALHOST:
            return
        try:
            async with self._noting:
                if error is None:
                    await self.store.note_ready(name)
                else:
                    await self.store.note_failure(name, str(error), _status_of(error))
        except RbeeError as exc:  # it was removed meanwhile, or the disk is full: no hive's fault
            log.warning("node %s: %s", name, exc)

    async def ssh(self) -> Remote:
        """Return the SSH side, loaded if it is not yet."""
        async with self._loading:
            if self._remote is None:
                self._remote = await self._load()
            return self._remote

    async def _load(self) -> Remote:
        # In a thread: importing takes half a second, in which no stream should stand.
        load = importlib.import_module
        module = await trio.to_thread.run_sync(load, "rbee.queen.remote")
        remote: Remote
        # Bounded by `open_aio`. Cancelled here, what is started would never learn of it.
        with trio.CancelScope(shield=True):
            remote = await self.tasks.start(self._keep_ssh, module)
        return remote

    async def _keep_ssh(self, module: Any, *, task_status: trio.TaskStatus[Remote]) -> None:
        # Shielded till `open` ends: hives need it for their own end. It has no work of its own.
        with self._lasting:
            async with module.open_aio(name="ssh", uvloop=False) as aio:
                task_status.started(module.Remote(self._setup, aio))
                await trio.sleep_forever()

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        """Hold the SSH side; what uses it ends within the body."""
        async with super().open():
            try:
                yield
            finally:
                self._lasting.cancel(reason="the queen stops")


def _status_of(error: BaseException) -> NodeStatus:
    code = getattr(error, "code", "")
    if code in ("unreachable", "ssh_auth", "ssh_key", "ssh_config", "connection_lost"):
        return NodeStatus.UNREACHABLE
    return NodeStatus.UNUSABLE
