"""A node as its queen works on it: its hive is found there or started, and reached.

The queen's own machine is one; those over SSH are `rbee.queen.remote`'s.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

import attrs
import trio

from rbee.daemon import read_run_file
from rbee.errors import RbeeError, UnavailableError, leaves
from rbee.home import Home, read_token_file, short_name
from rbee.model import LOCALHOST, Grace, new_id
from rbee.process import Daemon, open_daemon, own_environment
from rbee.queen.limits import Limits
from rbee.wire.messages import DaemonStart, Hello, RunFile


@attrs.frozen
class QueenSetup:
    """What one queen is.

    Attributes:
        token_file: where an operator's queen has ``token`` from; None for an owned one.
        lease: seconds that its hives and their guards allow it.
        engine: of requests that leave it open; "" is the default one.
        is_ephemeral: whether its home goes with it.
        limits: how much it takes at once.
    """

    id: str
    home: Home
    run_dir: Path
    token: str = attrs.field(repr=False)
    nonce: str
    token_file: Path | None = None
    owner: str = "operator"
    host: str = "127.0.0.1"
    port: int = 0
    exact_port: bool = False
    hive_port: int = 9200
    lease: float = 10.0
    engine: str = ""
    is_ephemeral: bool = False
    grace: Grace = attrs.field(factory=Grace)
    limits: Limits = attrs.field(factory=Limits)


def start_of(setup: QueenSetup, queen_url: str, *, engine: str = "") -> DaemonStart:
    """Say what a new hive of ours is told: ``queen_url`` is our address as its node sees it."""
    return DaemonStart(
        owner=setup.id,
        token=setup.token,
        run_dir=short_name(new_id("hive")),
        queen_url=queen_url,
        queen_id=setup.id,
        lease=setup.lease,
        engine=engine,
    )


@attrs.frozen
class FoundHive:
    """A hive that an operator has started, and the token that opens it."""

    run_file: RunFile
    token: str = attrs.field(repr=False)


class OwnedHive(Protocol):
    """A hive of ours that has said hello."""

    @property
    def hello(self) -> Hello: ...

    async def wait(self) -> int:
        """Return its exit code once it has ended; raise if the node is lost before."""
        ...

    async def ended(self, status: int) -> RbeeError:
        """Make the error of an end that nobody asked for, with its log's tail."""
        ...


class Machine(Protocol):
    """A node for as long as it is connected."""

    async def find_hive(self) -> FoundHive | None:
        """Return the hive that an operator has started here."""
        ...

    def open_hive(self, start: DaemonStart) -> AbstractAsyncContextManager[OwnedHive]:
        """Own a hive here while the body runs."""
        ...

    async def via(self, url: str) -> str:
        """Return an address of ours for one that this node has told us as its own."""
        ...

    async def queen_url(self, url: str) -> str:
        """Return this node's address for our own ``url``; "" if there is none."""
        ...

    async def wait_lost(self) -> RbeeError:
        """Wait until the node is not connected any more and return why."""
        ...


@attrs.frozen
class LocalHive:
    """A hive of ours on the queen's own machine."""

    daemon: Daemon

    @property
    def hello(self) -> Hello:
        return self.daemon.hello

    async def wait(self) -> int:
        return await self.daemon.wait()

    async def ended(self, status: int) -> RbeeError:
        return self.daemon.ended(status)


@asynccontextmanager
async def open_local_hive(setup: QueenSetup, start: DaemonStart) -> AsyncGenerator[OwnedHive, None]:
    """Own a hive on this machine while the body runs."""
    argv = [
        sys.executable, "-m", "rbee.hive", "daemon", "--owned", "--node", LOCALHOST,
        "--home", str(setup.home.root), "--port", str(setup.hive_port),
    ]  # fmt: skip
    start = attrs.evolve(start, run_dir=str(setup.run_dir / start.run_dir))
    async with open_daemon(
        argv, start, graces=[setup.grace.guard_a, setup.grace.guard_b],
        log_file=setup.home.log_file(f"hive-{LOCALHOST}"),
        # Where the queen is told to listen is not where her hive shall: empty is not set.
        env=own_environment(setup.home.root, setup.nonce) | {"RBEE_HOST": ""},
        adopt_grace=setup.grace.worker_guard + 1,
        orphaned=(setup.home.root, setup.home.run) if setup.is_ephemeral else (),
    ) as daemon:  # fmt: skip
        yield LocalHive(daemon)


@attrs.define(eq=False)
class FirstHive:
    """The hive of this machine, started before the queen can ask for it.

    Starting takes it as long as it takes the queen to import what she is made of.
    """

    setup: QueenSetup
    start: DaemonStart
    is_taken: bool = False
    _hive: OwnedHive | None = None
    _error: RbeeError | None = None
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _told: trio.Event = attrs.field(factory=trio.Event)
    _over: trio.Event = attrs.field(factory=trio.Event)

    async def keep(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Run it until cancelled, or until who has taken it leaves it."""
        task_status.started()
        try:
            with self._scope:
                async with open_local_hive(self.setup, self.start) as self._hive:
                    self._told.set()
                    await trio.sleep_forever()
        except* RbeeError as group:  # for who takes it
            self._error = next(one for one in leaves(group) if isinstance(one, RbeeError))
        finally:
            self._told.set()
            self._over.set()

    @asynccontextmanager
    async def taken(self) -> AsyncGenerator[OwnedHive, None]:
        """Have it as one's own while the body runs; it has said hello before the body starts."""
        self.is_taken = True
        try:
            await self._told.wait()
            if self._hive is None:
                raise self._error or UnavailableError(
                    "the queen is stopping", code="queen_stopping"
                )
            yield self._hive
        finally:
            self._scope.cancel(reason="it is not used any more")
            with trio.CancelScope(shield=True):  # bounded, as the end of any guarded child
                await self._over.wait()
            if self._error is not None:
                raise self._error


@attrs.frozen
class LocalMachine:
    """The machine that the queen itself runs on; its ``first`` hive may be on its way already."""

    setup: QueenSetup
    first: FirstHive | None = None

    async def find_hive(self) -> FoundHive | None:
        found = read_run_file(self.setup.home.hive_file)
        return FoundHive(found, read_token_file(Path(found.token_file))) if found else None

    def open_hive(self, start: DaemonStart) -> AbstractAsyncContextManager[OwnedHive]:
        if self.first is not None and start is self.first.start:
            return self.first.taken()
        return open_local_hive(self.setup, start)

    async def via(self, url: str) -> str:
        return url

    async def queen_url(self, url: str) -> str:
        return url

    async def wait_lost(self) -> RbeeError:
        return await trio.sleep_forever()
