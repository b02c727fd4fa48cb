"""The queen's hives: found or owned, one lifetime each, and what they tell of their workers."""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs
import httpx
import trio

from rbee.broadcast import Broadcast
from rbee.daemon import read_run_file
from rbee.errors import (
    ConflictError,
    NotFoundError,
    PeerError,
    RbeeError,
    UnavailableError,
    leaves,
)
from rbee.home import Home, read_token_file, short_name
from rbee.model import LOCALHOST, Grace, WorkerId, WorkerState, new_id
from rbee.process import open_daemon, own_environment
from rbee.registry import Registry
from rbee.scopes import TaskOwner
from rbee.web.client import call, open_client, open_events
from rbee.wire import codec, messages
from rbee.wire.messages import (
    DaemonStart,
    ErrorDetail,
    Health,
    Heartbeat,
    HiveInfo,
    Narration,
    OwnerLease,
    RunFile,
    StartWorker,
    WorkerIds,
    WorkerInfo,
    WorkerNarration,
)

log = logging.getLogger(__name__)

RENEW = 2.0
STOP = 20.0  # seconds for a worker to be stopped
FOLLOW_AGAIN = 0.2
SILENT = 11.0  # seconds without a heartbeat, which come every 5: it does not answer
KEPT_FAILURES = 100
Narrate = Callable[[Narration], None]
OVER = frozenset({WorkerState.STOPPED.value, WorkerState.FAILED.value})


@attrs.frozen
class QueenSetup:
    """What one queen is.

    Attributes:
        token_file: where an operator's queen has ``token`` from; None for an owned one.
        lease: seconds that its hives and their guards allow it.
    """

    id: str
    home: Home
    run_dir: Path
    token: str
    nonce: str
    token_file: Path | None = None
    owner: str = "operator"
    host: str = "127.0.0.1"
    port: int = 0
    exact_port: bool = False
    hive_port: int = 9200
    lease: float = 10.0
    grace: Grace = attrs.field(factory=Grace)


@attrs.define(eq=False)
class Hive:
    """A hive that answers; usable until `gone`."""

    info: HiveInfo
    owned: bool
    token: str
    client: httpx.AsyncClient
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    starting: trio.Lock = attrs.field(factory=trio.Lock)
    gone: trio.Event = attrs.field(factory=trio.Event)
    heard: float = attrs.field(factory=trio.current_time)

    async def start_worker(self, request: StartWorker) -> WorkerInfo:
        return await call(
            self.client, "POST", messages.HIVE_WORKERS, WorkerInfo, request, what=self.name
        )

    async def stop_worker(self, worker_id: str) -> None:
        path = f"{messages.HIVE_WORKERS}/{worker_id}"
        await call(self.client, "DELETE", path, type(None), what=self.name, limit=STOP)

    def note_beat(self, beat: Heartbeat) -> None:
        self.info = attrs.evolve(
            self.info, workers=len(beat.workers), memory_total=beat.memory_total,
            memory_free=beat.memory_free, disk_free=beat.disk_free,
        )  # fmt: skip

    def note_answering(self, answers: bool) -> None:
        state = "ready" if answers else "unresponsive"
        if self.info.state not in (state, "stopping"):
            log.warning("%s %s", self.name, "answers again" if answers else "does not answer")
            self.info = attrs.evolve(self.info, state=state)

    def told(self) -> HiveInfo:
        return attrs.evolve(self.info, last_seen=round(trio.current_time() - self.heard, 3))

    @property
    def name(self) -> str:
        return f"hive on {self.info.node}"


class Hives(TaskOwner):
    """All hives of one queen and the workers it asked them for."""

    def __init__(self, setup: QueenSetup) -> None:
        self._setup = setup
        self._hives: dict[str, Hive] = {}
        self._locks: dict[str, trio.Lock] = {}
        self.queen_id = setup.id
        self.url = ""
        self.workers: Registry[WorkerId, WorkerInfo] = Registry()
        self.failures: OrderedDict[str, WorkerInfo] = OrderedDict()
        self.narrations: Broadcast[WorkerNarration] = Broadcast()

    def infos(self) -> list[HiveInfo]:
        return [hive.told() for hive in self._hives.values()]

    def nodes(self) -> list[str]:
        return [LOCALHOST]

    def running(self, node: str) -> Hive | None:
        return self._hives.get(node)

    async def get(self, node: str, narrate: Narrate) -> Hive:
        """Return the node's hive, found or started.

        Raises:
            NotFoundError: there is no such node.
            RbeeError: its hive cannot be started.
        """
        async with self._lock(node):
            hive = self._hives.get(node)
            if hive is None:
                hive = await self.tasks.start(partial(self._keep, node, narrate))
            return hive

    async def stop(self, node: str) -> None:
        """End the node's hive with all its workers; return when nothing of it is left.

        Raises:
            NotFoundError: there is no such node.
            ConflictError: an operator has started it, so it is not ours to end.
        """
        async with self._lock(node):
            hive = self._hives.get(node)
            found = read_run_file(self._setup.home.hive_file)
            pid = hive.info.pid if hive else found.pid if found else 0
            if pid and (hive is None or not hive.owned):
                raise _operators(node, pid)
            if hive is not None:
                self._note_stopping(hive)
                hive.scope.cancel(reason="asked to stop")
                await hive.gone.wait()

    def _note_stopping(self, hive: Hive) -> None:
        """Place nothing there any more."""
        hive.info = attrs.evolve(hive.info, state="stopping")
        for info in self.workers:
            if info.node == hive.info.node:
                self.take_info(attrs.evolve(info, state=WorkerState.STOPPING.value))

    def _lock(self, node: str) -> trio.Lock:
        """Return what lets one at a time start or stop a node's hive."""
        if node not in self.nodes():
            raise NotFoundError(
                f"no node {node!r}; known: {', '.join(self.nodes())}",
                code="unknown_node",
                hint="rbee-keeper infer --node localhost …",
            )
        return self._locks.setdefault(node, trio.Lock())

    # one hive's life -------------------------------------------------------------------------
    async def _keep(
        self, node: str, narrate: Narrate, *, task_status: trio.TaskStatus[Hive]
    ) -> None:
        """Survive a hive's end: it is told to whoever waits for its workers."""
        status = _Started(task_status)
        error: BaseException = PeerError("it ended")
        try:
            with status.scope:  # `stop` cancels it
                await self._run(node, narrate, status)
            if status.scope.cancelled_caught:
                error = UnavailableError("it was stopped")
        except* RbeeError as group:
            error = next(leaves(group))
        if not status.done:
            raise error  # bare: whoever asked for the hive handles it as any refusal
        log.warning("hive on %s is gone: %s", node, error)
        self._lose(node, error)

    async def _run(self, node: str, narrate: Narrate, status: _Started) -> None:
        found = read_run_file(self._setup.home.hive_file)
        if found is not None:
            await self._use(node, found, status)
        else:
            await self._own(node, narrate, status)

    async def _use(self, node: str, found: RunFile, status: _Started) -> None:
        """Use an operator's hive for as long as it runs; it stays when we go."""
        token = read_token_file(Path(found.token_file))
        async with open_client(found.url, token) as client:
            health = await call(client, "GET", messages.HEALTH, Health, what="the operator's hive")
            info = HiveInfo(
                node, health.id, found.url, health.state, health.owner, health.pid, health.version
            )
            hive = Hive(info, False, token, client, status.scope)
            await self._renew(hive)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_lease, hive)
                nursery.start_soon(_keep_watching, hive)
                try:
                    await self._follow(hive, status)
                finally:
                    nursery.cancel_scope.cancel(reason="hive is not used any more")
                    with trio.move_on_after(1, shield=True):  # else the lease ends it
                        await self._say_goodbye(hive)

    async def _own(self, node: str, narrate: Narrate, status: _Started) -> None:
        """Start a hive of our own, which ends with this scope, and use it."""
        narrate(Narration("queen", "start", f"a hive on {node}"))
        setup = self._setup
        start = DaemonStart(
            owner=setup.id,
            token=setup.token,
            run_dir=str(setup.run_dir / short_name(new_id("hive"))),
            queen_url=self.url,
            queen_id=setup.id,
            lease=setup.lease,
        )
        argv = [
            sys.executable, "-m", "rbee.hive", "daemon", "--owned", "--node", node,
            "--home", str(setup.home.root), "--port", str(setup.hive_port),
        ]  # fmt: skip
        async with open_daemon(
            argv, start, graces=[setup.grace.guard_a, setup.grace.guard_b],
            log_file=setup.home.log_file(f"hive-{node}"),
            env=own_environment(setup.home.root, setup.nonce),
            adopt_grace=setup.grace.worker_guard + 1,
        ) as daemon:  # fmt: skip
            hello = daemon.hello
            info = HiveInfo(node, hello.id, hello.url, "ready", setup.id, hello.pid, hello.version)
            async with open_client(hello.url, setup.token) as client:
                hive = Hive(info, True, setup.token, client, status.scope)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_following, hive, status)
                    nursery.start_soon(_keep_watching, hive)
                    ended = await daemon.wait()
                    raise daemon.ended(ended)

    async def _keep_following(self, hive: Hive, status: _Started) -> None:
        """Take the news of a hive that lives; a stream that broke begins with a new snapshot."""
        while True:
            try:
                await self._follow(hive, status)
            except (PeerError, UnavailableError) as exc:
                log.info("%s: %s", hive.name, exc)  # if it has ended, its end tells more
            await trio.sleep(FOLLOW_AGAIN)

    async def _follow(self, hive: Hive, status: _Started) -> None:
        """Take a hive's news until it ends; the hive is usable once its snapshot is here."""
        async with open_events(hive.client, "GET", messages.HIVE_WORKERS, what=hive.name) as events:
            async for name, data in events:
                self._take(hive, name, data)
                if not status.done:
                    self._hives[hive.info.node] = hive
                    status.started(hive)
        raise UnavailableError(f"{hive.name} ended its news")

    def _take(self, hive: Hive, name: str, data: str) -> None:
        hive.heard = trio.current_time()
        if name == "heartbeat":
            beat = codec.loads(data, Heartbeat)
            hive.note_beat(beat)
            for info in beat.workers:
                self.take_info(info)
        elif name == "workerids":
            self._forget_others(hive, set(codec.loads(data, WorkerIds).worker_ids))
        elif name == "workernarration":
            self._take_narration(codec.loads(data, WorkerNarration))
        elif name == "workerinfo":
            self.take_info(codec.loads(data, WorkerInfo))

    def _take_narration(self, told: WorkerNarration) -> None:
        self.narrations.send(told)
        info = self.workers.get(WorkerId(told.worker_id))
        if info is not None and told.actor == "worker":  # its progress
            self.take_info(attrs.evolve(info, progress=told.text, share=told.share))

    def _forget_others(self, hive: Hive, living: set[str]) -> None:
        detail = ErrorDetail("worker_lost", f"the worker ended while the news of {hive.name} broke")
        for info in self.workers:
            if info.node == hive.info.node and info.worker_id not in living:
                self._fail(info, detail)

    def _fail(self, info: WorkerInfo, detail: ErrorDetail) -> None:
        self.take_info(attrs.evolve(info, state=WorkerState.FAILED.value, error=detail))

    def note_started(self, info: WorkerInfo) -> None:
        """Note a worker just asked for, unless its news was quicker and tells more."""
        if info.worker_id not in self.failures and not self.workers.get(WorkerId(info.worker_id)):
            self.take_info(info)

    def take_info(self, info: WorkerInfo) -> None:
        """Note a worker's newest state; only the workers we asked for are ours."""
        if info.owner != self._setup.id:
            return
        worker_id = WorkerId(info.worker_id)
        if info.state not in OVER:
            self.workers.set(worker_id, info)
            return
        self._remember(info)
        self.workers.remove(worker_id)

    def _remember(self, info: WorkerInfo) -> None:
        self.failures[info.worker_id] = info
        while len(self.failures) > KEPT_FAILURES:
            self.failures.popitem(last=False)

    def _lose(self, node: str, error: BaseException) -> None:
        """Forget a hive and its workers; whoever waits for one of them is told."""
        details = error.details if isinstance(error, RbeeError) else {}
        detail = ErrorDetail("hive_lost", f"the hive on {node} is gone: {error}", details=details)
        for info in self.workers:
            if info.node == node:
                self._fail(info, detail)
        hive = self._hives.pop(node, None)
        if hive is not None:
            hive.gone.set()

    # an operator's hive ----------------------------------------------------------------------
    async def _keep_lease(self, hive: Hive) -> None:
        while True:
            await trio.sleep(RENEW)
            await self._renew(hive)

    async def _renew(self, hive: Hive) -> None:
        lease = OwnerLease(self.url, self._setup.token, self._setup.lease)
        path = f"{messages.HIVE_OWNERS}/{self._setup.id}"
        await call(hive.client, "PUT", path, type(None), lease, what=hive.name)

    async def _say_goodbye(self, hive: Hive) -> None:
        path = f"{messages.HIVE_OWNERS}/{self._setup.id}"
        try:
            await call(hive.client, "DELETE", path, type(None), what=hive.name)
        except RbeeError as exc:
            log.info("goodbye to %s: %s", hive.name, exc)


async def _keep_watching(hive: Hive) -> None:
    """See when a hive falls silent, though its connections stand: a frozen process keeps them."""
    while True:
        hive.note_answering(trio.current_time() - hive.heard < SILENT)
        await trio.sleep(1)


def _operators(node: str, pid: int) -> ConflictError:
    return ConflictError(
        f"the hive on {node} (pid {pid}) was started by an operator: it is not this queen's to end",
        code="not_owned",
        hint=f"kill {pid}   # on {node}; it ends with all its workers, other queens' too",
    )


@attrs.define(eq=False)
class _Started:
    """A task status that remembers whether it was used, and the scope of what was started."""

    _status: trio.TaskStatus[Hive]
    done: bool = False
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def started(self, hive: Hive) -> None:
        self.done = True
        self._status.started(hive)
