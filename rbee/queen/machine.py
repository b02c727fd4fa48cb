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
from rbee.errors import RbeeError
from rbee.home import Home, read_token_file
from rbee.model import LOCALHOST, Grace
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
class _LocalHive:
    daemon: Daemon

    @property
    def hello(self) -> Hello:
        return self.daemon.hello

    async def wait(self) -> int:
        return await self.daemon.wait()

    async def ended(self, status: int) -> RbeeError:
        return self.daemon.ended(status)


@attrs.frozen
class LocalMachine:
    """The machine that the queen itself runs on."""

    setup: QueenSetup

    async def find_hive(self) -> FoundHive | None:
        found = read_run_file(self.setup.home.hive_file)
        return FoundHive(found, read_token_file(Path(found.token_file))) if found else None

    @asynccontextmanager
    async def open_hive(self, start: DaemonStart) -> AsyncGenerator[OwnedHive, None]:
        setup = self.setup
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
            yield _LocalHive(daemon)

    async def via(self, url: str) -> str:
        return url

    async def queen_url(self, url: str) -> str:
        return url

    async def wait_lost(self) -> RbeeError:
        return await trio.sleep_forever()
