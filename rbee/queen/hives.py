"""The queen's hives: found or owned, one lifetime each, and what they tell of their workers."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path

import attrs
import trio

from rbee import __version__
from rbee.broadcast import Broadcast
from rbee.clean import Clean
from rbee.daemon import read_run_file
from rbee.errors import (
    ConflictError,
    MachineError,
    PeerError,
    RbeeError,
    UnavailableError,
    leaves,
)
from rbee.model import LOCALHOST, WorkerId, WorkerState
from rbee.queen.hive import Hive
from rbee.queen.machine import FoundHive, Machine, OwnedHive, QueenSetup, start_of
from rbee.queen.machines import Machines, Narrate
from rbee.registry import Registry
from rbee.remains import UNVERIFIED, as_left
from rbee.scopes import TaskOwner
from rbee.sweep import sweep
from rbee.web.client import answering_within, call, open_client, open_events
from rbee.wire import codec, messages
from rbee.wire.messages import (
    ErrorDetail,
    Health,
    Heartbeat,
    HiveInfo,
    Narration,
    OwnerLease,
    WorkerIds,
    WorkerInfo,
    WorkerNarration,
    WorkerReady,
)

log = logging.getLogger(__name__)

RENEW = 2.0
FOLLOW_AGAIN = 0.2
REACH = 5.0  # seconds for a port that must be open
HEARD = 15.0  # seconds for a hive to tell what workers it has
ENDS = 0.5  # seconds for the word that a hive has ended, not a firewall closed its port
KEPT_FAILURES = 100
LEFT_AGAIN = 2.0  # seconds between two tries to end what is left of a hive
BETWEEN = 0.2  # seconds that each of them takes at most
LOST = "connection_lost"  # as `rbee.ssh.ConnectionLostError` says it, which is not loaded yet
COMING = frozenset({WorkerState.STARTED.value, WorkerState.LOADING.value})
OVER = frozenset({WorkerState.STOPPED.value, WorkerState.FAILED.value})


class Hives(TaskOwner):
    """All hives of one queen and the workers it asked them for."""

    def __init__(self, setup: QueenSetup, machines: Machines) -> None:
        self._setup = setup
        self.machines = machines
        self._hives: dict[str, Hive] = {}
        self._locks: dict[str, trio.Lock] = {}
        self._starts: dict[str, _Started] = {}
        self._left: dict[str, _Left] = {}
        self.cleaned = Clean("hive")
        self.queen_id = setup.id
        self.url = ""
        self.workers: Registry[WorkerId, WorkerInfo] = Registry()
        self.failures: OrderedDict[str, WorkerInfo] = OrderedDict()
        self.beats: dict[str, Heartbeat] = {}  # the last of each node, also when its hive is gone
        self.narrations: Broadcast[WorkerNarration] = Broadcast()

    def infos(self) -> list[HiveInfo]:
        """Return the hives that run, and those that have ended with something left."""
        left = [one.info for one in self._left.values()]
        return [*(hive.told() for hive in self._hives.values()), *left]

    def running(self, node: str) -> Hive | None:
        return self._hives.get(node)

    async def get(self, node: str, narrate: Narrate) -> Hive:
        """Return the node's hive, found or started.

        Raises:
            NotFoundError: there is no such node.
            RbeeError: its hive cannot be started.
        """
        if node not in self._hives:
            await self.machines.check(node)
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
            MachineError: something of it is left, or nobody can tell (`rbee.remains.LEFT`).
        """
        if node not in self._hives:
            await self.machines.check(node)
            if (start := self._starts.get(node)) is not None:
                start.scope.cancel(reason="asked to stop")
        async with self._lock(node):
            hive = self._hives.get(node)
            pid = hive.info.pid if hive else self._operators_pid(node)
            if pid and (hive is None or not hive.owned):
                raise _operators(node, pid)
            if hive is not None:
                self._note_stopping(hive)
                hive.scope.cancel(reason="asked to stop")
                await hive.gone.wait()
                if (left := self._left.get(hive.info.hive_id)) is not None:
                    raise left.error

    def _operators_pid(self, node: str) -> int:
        """Return the pid of the hive that an operator runs on this machine; 0 for none."""
        found = read_run_file(self._setup.home.hive_file) if node == LOCALHOST else None
        return found.pid if found else 0

    def _note_stopping(self, hive: Hive) -> None:
        """Place nothing there any more."""
        hive.info = attrs.evolve(hive.info, state="stopping")
        for info in self.workers:
            if info.node == hive.info.node:
                self.take_info(attrs.evolve(info, state=WorkerState.STOPPING.value))

    def _lock(self, node: str) -> trio.Lock:
        """Return what lets one at a time start or stop a node's hive."""
        return self._locks.setdefault(node, trio.Lock())

    # one hive's life -------------------------------------------------------------------------
    async def _keep(
        self, node: str, narrate: Narrate, *, task_status: trio.TaskStatus[Hive]
    ) -> None:
        """Survive a hive's end: it is told to whoever waits for its workers."""
        status = self._starts[node] = _Started(task_status)
        error: BaseException = PeerError("it ended")
        try:
            with status.scope:  # `stop` cancels it
                await self._run(node, narrate, status)
            if status.scope.cancelled_caught:
                error = UnavailableError("it was stopped")
        except* RbeeError as group:
            error = next(leaves(group))
        finally:
            del self._starts[node]
        if status.done:  # before the registry, which may wait for a lock
            log.warning("hive on %s is gone: %s", node, error)
            left = as_left(error) or self._unseen(node)
            if left is None and status.ending_since:
                self.cleaned.note(status.ending_since)
            self._note_left(node, left, status)
            self._lose(node, error)
        if not status.scope.cancelled_caught:
            await self.machines.note(node, error)
        if not status.done:
            raise error  # bare: whoever asked for the hive handles it as any refusal

    def _unseen(self, node: str) -> RbeeError | None:
        """Make the error of a node that does not tell whether its hive has ended."""
        seconds = self.machines.fenced_for(node)
        if seconds <= 0:
            return None
        return MachineError(
            f"node {node} does not tell whether its hive has ended: for {seconds:.0f} s something "
            "of it may still run there",
            code=UNVERIFIED,
            hint=f"rbee-keeper reap --node {node} --dry-run",
        )

    def _note_left(self, node: str, error: RbeeError | None, status: _Started) -> None:
        hive = self._hives.get(node)
        if error is not None and hive is not None and hive.owned:
            info = attrs.evolve(hive.told(), state=error.code, workers=0, left=str(error))
            self._left[info.hive_id] = _Left(info, error)
            self.tasks.start_soon(self._until_nothing_left, info, status.run_dir)

    async def _until_nothing_left(self, info: HiveInfo, run_dir: str) -> None:
        """End what is left of a hive of ours; over SSH its guards do, and the fence tells when."""
        if info.node == LOCALHOST:
            await _until_swept(self._setup.run_dir / run_dir)
        else:
            await trio.sleep(self.machines.fenced_for(info.node))
        del self._left[info.hive_id]

    async def _run(self, node: str, narrate: Narrate, status: _Started) -> None:
        """Reach a node's hive and use it; once more if the node is lost before it is usable."""
        try:
            await self._reach(node, narrate, status)
            return
        except* RbeeError as group:
            error = next(leaves(group))
            if status.done or getattr(error, "code", "") != LOST:
                raise
            narrate(Narration("queen", "connect", f"once more, since {error}"))
        # What it may have left there is waited for, as after any hive that was lost.
        await self._reach(node, narrate, status)

    async def _reach(self, node: str, narrate: Narrate, status: _Started) -> None:
        async with self.machines.connect(node, narrate) as machine:
            found = await machine.find_hive()
            if found is not None:
                await self._use(node, machine, found, status)
            else:
                await self._own(node, machine, narrate, status)

    async def _use(self, node: str, machine: Machine, found: FoundHive, status: _Started) -> None:
        """Use an operator's hive for as long as it runs; it stays when we go."""
        url = await machine.via(found.run_file.url)
        async with open_client(url, found.token) as client:
            what = f"the operator's hive on {node}"
            health = await call(client, "GET", messages.HEALTH, Health, what=what)
            _check_version(node, health.version)
            info = HiveInfo(
                node, health.id, found.run_file.url, health.state, health.owner, health.pid,
                health.version,
            )  # fmt: skip
            hive = Hive(info, False, found.token, client, status.scope, machine.via)
            await self._use_leased(hive, machine, await machine.queen_url(self.url), status)

    async def _use_leased(
        self, hive: Hive, machine: Machine, queen_url: str, status: _Started
    ) -> None:
        lease = OwnerLease(queen_url, self._setup.token, self._setup.lease)
        await self._renew(hive, lease)
        is_lost = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_lease, hive, lease)
                nursery.start_soon(self._keep_following, hive, status, lease)
                nursery.start_soon(_wait_heard, hive, status)
                nursery.start_soon(hive.keep_watching)
                # What it was told of us leads elsewhere now: nobody there is to get the token.
                raise await machine.wait_lost()
        except* RbeeError:
            is_lost = True
            raise
        finally:
            if not is_lost:  # else it may be used again before the lease ends its workers
                with trio.move_on_after(1, shield=True):
                    await self._say_goodbye(hive)

    async def _own(self, node: str, machine: Machine, narrate: Narrate, status: _Started) -> None:
        """Start a hive of our own, which ends with this scope, and use it."""
        setup = self._setup
        start = self.machines.begun(node) or start_of(setup, await machine.queen_url(self.url))
        status.run_dir = start.run_dir
        narrate(Narration("queen", "start", f"a hive on {node}"))
        async with machine.open_hive(start) as daemon:
            hello = daemon.hello
            _check_version(node, hello.version)
            info = HiveInfo(node, hello.id, hello.url, "ready", setup.id, hello.pid, hello.version)
            async with open_client(await machine.via(hello.url), setup.token) as client:
                hive = Hive(info, True, setup.token, client, status.scope, machine.via)
                if node != LOCALHOST:
                    await _check_reached(hive, daemon)
                try:
                    await self._use_owned(hive, daemon, status)
                finally:
                    status.ending_since = time.monotonic()

    async def _use_owned(self, hive: Hive, daemon: OwnedHive, status: _Started) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_following, hive, status)
            nursery.start_soon(_wait_heard, hive, status)
            nursery.start_soon(hive.keep_watching)
            raise await daemon.ended(await daemon.wait())

    async def _keep_following(
        self, hive: Hive, status: _Started, lease: OwnerLease | None = None
    ) -> None:
        """Take the news of a hive that lives; a stream that broke begins with a new snapshot.

        That an operator's hive has ended is told by its ``lease``, which is not taken any more.
        """
        while True:
            try:
                await self._follow(hive, status)
            except (PeerError, UnavailableError) as exc:
                log.info("%s: %s", hive.name, exc)  # if it has ended, its end tells more
            if lease is not None:
                await self._renew_unless_frozen(hive, lease)
            await trio.sleep(FOLLOW_AGAIN)

    async def _follow(self, hive: Hive, status: _Started) -> None:
        """Take a hive's news until it ends; the hive is usable once its snapshot is here."""
        async with open_events(hive.client, "GET", messages.HIVE_WORKERS, what=hive.name) as events:
            async for name, data in events:
                await self._take(hive, name, data)
                if not status.done:
                    self._hives[hive.info.node] = hive
                    status.started(hive)
                    self.tasks.start_soon(self.machines.note, hive.info.node, None)
        raise UnavailableError(f"{hive.name} ended its news")

    async def _take(self, hive: Hive, name: str, data: str) -> None:
        hive.heard = trio.current_time()
        if name == "heartbeat":
            beat = codec.loads(data, Heartbeat)
            hive.note_beat(beat)
            self.beats[hive.info.node] = beat
            for info in beat.workers:
                await self.take_news(hive, info)
        elif name == "workerids":
            self._forget_others(hive, set(codec.loads(data, WorkerIds).worker_ids))
        elif name == "workernarration":
            self._take_narration(codec.loads(data, WorkerNarration))
        elif name == "workerinfo":
            await self.take_news(hive, codec.loads(data, WorkerInfo))

    async def take_news(self, hive: Hive, info: WorkerInfo) -> None:
        """Note a worker's newest state once we know our way to it."""
        if info.owner == self._setup.id and info.state not in OVER:
            await hive.learn(info.url)
        if info.state not in COMING or self._is_coming(info.worker_id):
            self.take_info(hive.at_node(info))

    def _is_coming(self, worker_id: str) -> bool:
        """Tell whether a worker may load: its ready callback overtakes the news of its loading."""
        known = self.workers.get(WorkerId(worker_id))
        return known is None or known.state in COMING

    async def take_ready(self, hive: Hive, told: WorkerReady) -> None:
        """Note that a worker loads no more; what its hive told of it meanwhile is newer."""
        await hive.learn(told.url)
        info = self.workers.get(WorkerId(told.worker_id))
        if info is not None and info.state in COMING:
            ready = attrs.evolve(
                info, state=WorkerState.READY.value, url=told.url, model=told.model_ref,
                slots=told.slots, pid=told.pid or info.pid, progress="", share=None,
            )  # fmt: skip
            self.take_info(hive.at_node(ready))

    def _take_narration(self, told: WorkerNarration) -> None:
        self.narrations.send(told)
        info = self.workers.get(WorkerId(told.worker_id))
        if info is not None and info.state in COMING and told.actor == "worker":  # its progress
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
            hive.note_gone()

    # an operator's hive ----------------------------------------------------------------------
    async def _keep_lease(self, hive: Hive, lease: OwnerLease) -> None:
        while True:
            await trio.sleep(RENEW)
            await self._renew_unless_frozen(hive, lease)

    async def _renew_unless_frozen(self, hive: Hive, lease: OwnerLease) -> None:
        """Renew the lease; a hive that is frozen ends none meanwhile, and is not lost."""
        try:
            await self._renew(hive, lease)
        except UnavailableError as exc:
            if exc.code != "unresponsive":
                raise

    async def _renew(self, hive: Hive, lease: OwnerLease) -> None:
        path = f"{messages.HIVE_OWNERS}/{self._setup.id}"
        await call(hive.client, "PUT", path, type(None), lease, what=hive.name, limit=lease.lease)

    async def _say_goodbye(self, hive: Hive) -> None:
        path = f"{messages.HIVE_OWNERS}/{self._setup.id}"
        try:
            await call(hive.client, "DELETE", path, type(None), what=hive.name)
        except RbeeError as exc:
            log.info("goodbye to %s: %s", hive.name, exc)


def _check_version(node: str, version: str) -> None:
    if version != __version__:
        hint = (
            f"rbee-keeper node install {node}" if node != LOCALHOST else "rbee-keeper hive status"
        )
        raise ConflictError(
            f"the hive on {node} is of rbee {version}, this queen of {__version__}",
            code="other_version",
            hint=hint,
        )


async def _until_swept(run_dir: Path) -> None:
    while True:
        try:
            await sweep(run_dir, within=BETWEEN)
            return
        except (MachineError, OSError):
            await trio.sleep(LEFT_AGAIN)


async def _wait_heard(hive: Hive, status: _Started) -> None:
    with answering_within(HEARD, hive.name):
        await status.used.wait()


async def _check_reached(hive: Hive, daemon: OwnedHive) -> None:
    """See that its port is open to us: it has said hello over SSH, which shows nothing of that."""
    try:
        await call(hive.client, "GET", messages.HEALTH, Health, what=hive.name, limit=REACH)
    except (UnavailableError, PeerError) as exc:
        with trio.move_on_after(ENDS):
            raise await daemon.ended(await daemon.wait()) from exc
        node, url = hive.info.node, hive.info.url
        hint = f"rbee-keeper node update {node} --transport ssh"
        if hive.client.base_url.host == "127.0.0.1":  # it is a forward
            hint = f"rbee-keeper node check {node}"
        raise UnavailableError(
            f"the {hive.name} runs, but {url} is not reached from here (a firewall?): {exc}",
            code="not_reachable",
            hint=hint,
        ) from exc


def _operators(node: str, pid: int) -> ConflictError:
    return ConflictError(
        f"the hive on {node} (pid {pid}) was started by an operator: it is not this queen's to end",
        code="not_owned",
        hint=f"kill {pid}   # on {node}; it ends with all its workers, other queens' too",
    )


@attrs.frozen
class _Left:
    """A hive of ours that has ended, and what of it is left."""

    info: HiveInfo
    error: RbeeError


@attrs.define(eq=False)
class _Started:
    """A task status that remembers whether it was used, and the scope of what was started."""

    _status: trio.TaskStatus[Hive]
    done: bool = False
    run_dir: str = ""
    ending_since: float = 0.0
    used: trio.Event = attrs.field(factory=trio.Event)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def started(self, hive: Hive) -> None:
        self.done = True
        self.used.set()
        self._status.started(hive)
