"""A cluster inside a trio program: its queen runs in the caller's nursery.

Hives are processes of their own, the one on this machine too. Leaving the block is the cascading
shutdown, and when the program dies, however it dies, the guards of its hives end everything.
Nothing of the program itself is touched: no signal handler, no environment, no logging.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import attrs
import trio

from rbee.client import AsyncClient
from rbee.ephemeral import open_ephemeral_home
from rbee.errors import leaves
from rbee.home import Home, find_home, open_home, short_name
from rbee.model import DEFAULT_ENGINE, LOCALHOST, PROGRAM, new_id
from rbee.nodes.store import NodeStore
from rbee.queen.embedded import embed
from rbee.queen.machine import QueenSetup
from rbee.scopes import open_service
from rbee.wire.messages import AddNode, Hello, StartWorker, WorkerInfo

LEASE = 10.0


@attrs.frozen
class EmbeddedQueen:
    """A queen that runs in this process.

    Attributes:
        home: the directory of its configuration, registry and logs.
        token: what callers must send.
    """

    id: str
    url: str
    home: Path
    token: str = attrs.field(repr=False)

    def client(self) -> AsyncClient:
        """Return a client for it."""
        return AsyncClient(self.url, self.token)


async def serve_queen(
    *,
    home: Path | str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    lease: float = LEASE,
    engine: str = DEFAULT_ENGINE,
    task_status: trio.TaskStatus[EmbeddedQueen] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a queen until cancelled; ``await nursery.start(serve_queen)`` returns an `EmbeddedQueen`.

    Cancelling ends its hives and workers and returns when nothing of them is left, within 8 s.

    Args:
        home: the `RBEE_HOME` to be the queen of; None makes one that goes with it, which shares
            only the models with the user's.
        port: 0 takes any free one.
        lease: seconds without a sign of life from this program after which its hives end.
        engine: of requests that name none.

    Raises:
        ConflictError: a queen of that home runs already, or the port is taken.
        MachineError: the home cannot be used.
    """
    await _serve(home, host, port, lease, engine, task_status=task_status)


async def _serve(
    home: Path | str | None,
    host: str,
    port: int,
    lease: float,
    engine: str,
    needs_hive: bool = False,
    *,
    task_status: trio.TaskStatus[EmbeddedQueen],
) -> None:
    with open_ephemeral_home() if home is None else nullcontext(open_home(home)) as place:
        setup = _setup(place, host, port, lease, engine)
        setup = attrs.evolve(setup, is_ephemeral=home is None)

        def say(hello: Hello) -> None:
            task_status.started(EmbeddedQueen(setup.id, hello.url, place.root, setup.token))

        await embed(setup, say, needs_hive=needs_hive)


def _setup(home: Home, host: str, port: int, lease: float, engine: str) -> QueenSetup:
    queen_id = new_id("queen")
    return QueenSetup(
        id=queen_id,
        home=home,
        run_dir=home.run / short_name(queen_id),
        token=secrets.token_hex(24),
        nonce=os.environ.get("RBEE_NONCE") or secrets.token_hex(8),
        owner=f"{PROGRAM}{os.getpid()}",
        host=host,
        port=port,
        exact_port=True,
        hive_port=0,
        lease=lease,
        engine=engine,
    )


class ClusterOptions(TypedDict, total=False):
    """The arguments of `open_cluster`."""

    models: Sequence[str]
    nodes: Sequence[str | AddNode]
    engine: str
    home: Path | str | None
    host: str
    port: int
    lease: float


class AsyncCluster:
    """A running cluster; made by `open_cluster`."""

    def __init__(self, queen: EmbeddedQueen, models: Sequence[str] = ()) -> None:
        self.queen = queen
        self.client = queen.client()
        self.models = tuple(models)

    @property
    def url(self) -> str:
        """The address of its queen."""
        return self.queen.url

    @property
    def token(self) -> str:
        """What callers of the queen must send: ``Authorization: Bearer …``."""
        return self.queen.token

    async def load(
        self, model: str, *, node: str | None = None, engine: str = "", **options: Any
    ) -> WorkerInfo:
        """Start a worker for ``model`` and return when it is ready.

        Args:
            node: where; None leaves it to the queen.
            options: further fields of `StartWorker`, such as ``device="0,1"``.

        Raises:
            RbeeError: it did not become ready, and why.
        """
        start = StartWorker(model, node=node, engine=engine, **options)
        return await self.client.start_worker(start)

    async def use(self, node: str | AddNode) -> None:
        """Have a hive on a node: one by its name in the user's registry, or one described here."""
        name = node if isinstance(node, str) else node.name
        if name != LOCALHOST:
            await self._register(node)
        await self.client.start_hive(name)

    async def _register(self, node: str | AddNode) -> None:
        if isinstance(node, AddNode):
            await self.client.add_node(node)
            return
        ours, users = find_home(self.queen.home), find_home()
        if node not in {info.name for info in await self.client.nodes()} and ours != users:
            await NodeStore.of(ours).add(await NodeStore.of(users).get(node))


@asynccontextmanager
async def open_cluster(
    *,
    models: Sequence[str] = (),
    nodes: Sequence[str | AddNode] = (),
    engine: str = DEFAULT_ENGINE,
    home: Path | str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    lease: float = LEASE,
) -> AsyncGenerator[AsyncCluster, None]:
    """Run a cluster while the body runs.

    The body starts when all ``nodes`` have a hive and all ``models`` are ready. Leaving it, also by
    an error or by being cancelled, ends everything below and returns when nothing is left. What
    the body raises comes out as it is.

    Args:
        models: one worker is started for each.
        nodes: names in the user's registry (`rbee-keeper node add`), or descriptions.
        engine, home, host, port, lease: as for `serve_queen`.

    Raises:
        RbeeError: a node or a model is not usable, and why.
    """
    raised: list[BaseException] = []
    # There is no other node in a home of its own, and no hive of an operator.
    needs_hive = home is None and bool(models) and not nodes
    serving = partial(_serve, home, host, port, lease, engine, needs_hive)
    try:
        async with open_service(serving) as queen:
            cluster = AsyncCluster(queen, models)
            await _all(cluster.use, nodes)
            await _all(cluster.load, models)
            try:
                yield cluster
            except BaseException as exc:
                raised.append(exc)
                raise
    except BaseExceptionGroup as group:
        error = _bare(group, raised)
    else:
        return
    raise error  # out here, so that its own context stays


async def _all(async_fn: Any, items: Sequence[Any]) -> None:
    async with trio.open_nursery() as nursery:
        for item in items:
            nursery.start_soon(async_fn, item)


def _bare(group: BaseException, raised: Sequence[BaseException]) -> BaseException:
    """Take off the groups that our own nurseries put around what the body, or one task, raised."""
    inside = [id(leaf) for leaf in leaves(group)]
    for one in raised:
        if inside == [id(leaf) for leaf in leaves(one)]:
            return one
    while isinstance(group, BaseExceptionGroup) and len(group.exceptions) == 1:
        group = group.exceptions[0]
    return group
