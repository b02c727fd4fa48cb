"""In-memory stand-ins for what a hive runs; with trio's autojump clock their time costs nothing."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from rbee.model import WorkerConfig
from rbee.process import Lifeline, Process
from rbee.wire.messages import ReadyState, WorkerInfo

FIRST_PID = 1 << 23  # above any real pid


class FakeProcess(Process):
    """A process that runs until `end` is called."""

    def __init__(self, pid: int) -> None:
        self._over = trio.Event()
        super().__init__(pid, -1, Lifeline(-1), self._wait_over)

    def end(self, status: int) -> None:
        """End as if by itself; later calls change nothing."""
        if self.status is None:
            self.status = status
            self._over.set()

    def ended(self) -> bool:
        return self._over.is_set()

    async def wait(self) -> int:
        return await self._wait_over()

    async def _wait_over(self) -> int:
        await self._over.wait()
        assert self.status is not None
        return self.status


@attrs.define(eq=False)
class FakeLauncher:
    """A `rbee.hive.launch.Launcher` whose workers do nothing.

    Attributes:
        starting: seconds until a worker is launched.
        stopping: seconds until one that is asked to stop has ended, by its model; 0 if not named.
        error: raised instead of launching.
        left: raised when a worker has ended: not all of it has.
        running: the processes that are there now, by worker id.
        configs: everything that was ever launched, by worker id.
    """

    starting: float = 0.0
    stopping: dict[str, float] = attrs.field(factory=dict)
    error: BaseException | None = None
    left: BaseException | None = None
    running: dict[str, FakeProcess] = attrs.field(factory=dict)
    configs: dict[str, WorkerConfig] = attrs.field(factory=dict)
    _pids: itertools.count[int] = attrs.field(factory=lambda: itertools.count(FIRST_PID))

    @asynccontextmanager
    async def __call__(
        self, config: WorkerConfig, log_file: Path
    ) -> AsyncGenerator[FakeProcess, None]:
        await trio.sleep(self.starting)
        if self.error is not None:
            raise self.error
        process = self.running[config.spec.id] = FakeProcess(next(self._pids))
        self.configs[config.spec.id] = config
        try:
            yield process
        finally:
            # Bounded as the real end is; one that has ended by itself takes no time.
            with trio.CancelScope(shield=True):
                await trio.sleep(0 if process.ended() else self.stopping.get(config.spec.model, 0))
            process.end(143)
            del self.running[config.spec.id]
            if self.left is not None:
                raise self.left


@attrs.define(eq=False)
class FakePeer:
    """A `rbee.hive.peer.Peer` that says what it is told to say.

    Attributes:
        keep_alive, running: as the worker would tell them; its idle time is the clock's.
        answers: False as long as the worker is frozen.
        end: what happens once it was told to stop.
    """

    worker_id: str
    keep_alive: float
    end: Callable[[int], None]
    running: int = 0
    answers: bool = True
    is_fresh: bool = True
    since: float = attrs.field(factory=trio.current_time)

    async def state(self) -> ReadyState | None:
        await trio.lowlevel.checkpoint()
        if not self.answers:
            return None
        idle = 0.0 if self.running else trio.current_time() - self.since
        return ReadyState(
            self.worker_id, "ready", running=self.running, idle=idle, keep_alive=self.keep_alive,
            is_fresh=self.is_fresh,
        )  # fmt: skip

    async def stop_if_idle(self) -> bool:
        await trio.lowlevel.checkpoint()
        if self.answers and not self.running:
            self.end(0)
            return True
        return False


@attrs.define(eq=False)
class FakeConnect:
    """A `rbee.hive.peer.Connect` to the workers of a `FakeLauncher`."""

    launch: FakeLauncher
    peers: dict[str, FakePeer] = attrs.field(factory=dict)

    def __call__(self, worker: WorkerInfo) -> FakePeer:
        end = self.launch.running[worker.worker_id].end
        self.peers[worker.worker_id] = FakePeer(worker.worker_id, worker.keep_alive, end)
        return self.peers[worker.worker_id]
