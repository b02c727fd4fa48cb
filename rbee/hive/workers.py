"""The hive's workers: one lifetime each, and the one object that owns them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import attrs
import trio

from rbee.broadcast import Broadcast
from rbee.clean import Clean
from rbee.errors import (
    BadInputError,
    ConflictError,
    MachineError,
    NotFoundError,
    RbeeError,
    UnavailableError,
    from_wire,
    leaves,
)
from rbee.gpus import usage
from rbee.guard import children, start_time
from rbee.hive.cards import Cards, Look
from rbee.hive.failures import died, outlived, too_slow
from rbee.hive.launch import Launcher
from rbee.hive.peer import Connect, Peer, connect_with
from rbee.hive.room import Memory, Room, Tenant, shares
from rbee.home import Home, short_name
from rbee.log_files import prune_logs
from rbee.metrics import Labels
from rbee.model import KEEP_ALIVE, Grace, WorkerConfig, WorkerId, WorkerSpec, WorkerState, new_id
from rbee.models.child import Narrate
from rbee.models.footprint import MemoryPlan
from rbee.models.hold import take_into_use
from rbee.models.reference import shown
from rbee.process import Process
from rbee.remains import LEFT, UNVERIFIED, as_left
from rbee.scopes import TaskOwner
from rbee.sweep import sweep
from rbee.web.client import PROBE
from rbee.wire.messages import (
    ErrorDetail,
    Heartbeat,
    HubAccess,
    ReadyState,
    StartWorker,
    WorkerInfo,
    WorkerNarration,
    WorkerReady,
)
from rbee.worker.engine import engine_kind
from rbee.worker.vllm_plan import own_backend

log = logging.getLogger(__name__)

LOAD_LIMIT = 600.0  # seconds from the launch to the ready callback
FIRST_USE = 10.0  # seconds that a new worker waits for whom it was started for
AGAIN = 0.2  # seconds at least between two looks at a worker
GUARD_ENDS = 2.0  # seconds for a guard to end after its worker has
LEFT_AGAIN = 2.0  # seconds between two tries to end what is left of one

News = WorkerInfo | WorkerNarration | Heartbeat
ACTIVE = frozenset({WorkerState.STARTED, WorkerState.LOADING, WorkerState.READY})


class Local(Protocol):
    """A model on this machine, ready to be loaded (`rbee.models.provision.LocalModel`)."""

    @property
    def reference(self) -> str: ...
    @property
    def directory(self) -> Path: ...
    @property
    def served_names(self) -> tuple[str, ...]: ...
    @property
    def context(self) -> int: ...


Provision = Callable[[StartWorker, Narrate], Awaitable[Local | None]]
"""Bring a model onto this machine; None for engines that need none."""
WarmUp = Callable[[str, Narrate], Awaitable[object]]
"""Have what every worker of an engine needs; returns when it is there."""


async def _nothing(engine: str, narrate: Narrate) -> None:
    return None


@attrs.frozen
class HiveSetup:
    """What one hive is.

    Attributes:
        token: expected from callers, handed to workers.
        owner: ``operator`` or the id of the queen that owns it.
        memory: bytes that its workers on the CPU may take in all; None for what is free.
        token_file: where an operator's hive has ``token`` from; None for an owned one.
        queen_url, queen_token: where ready callbacks go; "" until a queen says so.
        run_dir: its private directory; worker directories lie in it.
    """

    id: str
    home: Home
    run_dir: Path
    token: str
    owner: str = "operator"
    node: str = "localhost"
    host: str = "127.0.0.1"
    port: int = 0
    exact_port: bool = False
    worker_port: int = 8001
    memory: int | None = None
    queen_url: str = ""
    token_file: Path | None = None
    grace: Grace = attrs.field(factory=Grace)


@attrs.define(eq=False)
class Worker:
    """One worker from the request to its end, and until nothing of it is left.

    Attributes:
        ended: set when it has ended; what is left of it then is its ``state`` and its error.
        ready_at: when it had all the memory that it takes.
    """

    info: WorkerInfo
    request: StartWorker
    log_file: Path
    ended: trio.Event = attrs.field(factory=trio.Event)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    became_ready: trio.Event = attrs.field(factory=trio.Event)
    plan: MemoryPlan | None = None
    peer: Peer | None = None
    cards: Cards | None = None
    ready_at: float = float("inf")
    is_asked: bool = False
    unloading: bool = False
    seen_at: float = 0.0
    ending_since: float = 0.0
    is_fresh: bool = True

    @property
    def name(self) -> str:
        return self.info.model

    @property
    def backend(self) -> str:
        return self.info.backend

    @property
    def device(self) -> str:
        return self.info.device

    @property
    def is_pinned(self) -> bool:
        return self.info.keep_alive < 0

    @property
    def idle(self) -> float:
        """Seconds without work, as far as is known; 0 for one that works, or soon will."""
        if self.info.running or self.state is not WorkerState.READY:
            return 0.0
        idle = self.info.idle + trio.current_time() - self.seen_at
        return 0.0 if self.is_fresh and idle < FIRST_USE else idle

    @property
    def is_over(self) -> bool:
        """Whether its end was asked for: it is silent."""
        return self.unloading or self.scope.cancel_called

    @property
    def state(self) -> WorkerState:
        return WorkerState(self.info.state)

    @property
    def id(self) -> WorkerId:
        return WorkerId(self.info.worker_id)


class Workers(TaskOwner):
    """All workers of one hive. Their tasks live in the nursery that `open` holds."""

    def __init__(
        self,
        setup: HiveSetup,
        launch: Launcher,
        provision: Provision,
        warm_up: WarmUp = _nothing,
        *,
        memory: Memory,
        connect: Connect | None = None,
        look: Look = usage,
    ) -> None:
        self._setup = setup
        self._workers: dict[WorkerId, Worker] = {}
        self._launch = launch
        self._provision = provision
        self._warm_up = warm_up
        self._connect = connect or connect_with(setup.token)
        there = self._workers.values
        self._look = look
        self._memory = memory
        self._room = Room(memory, there, self._look_at_all, self._make_idle_go)
        self.url = ""
        self.news: Broadcast[News] = Broadcast()
        self.cleaned = Clean("worker")
        self.ends: Counter[Labels] = Counter()
        self.on_ready: Callable[[WorkerInfo], None] = lambda info: None

    def infos(self) -> list[WorkerInfo]:
        return [worker.info for worker in self._workers.values()]

    def get(self, worker_id: str) -> Worker:
        worker = self._workers.get(WorkerId(worker_id))
        if worker is None:
            raise NotFoundError(
                f"no worker {worker_id!r} on {self._setup.node}",
                code="unknown_worker",
                hint="rbee-keeper worker list",
            )
        return worker

    # starting --------------------------------------------------------------------------------
    def start(self, request: StartWorker) -> WorkerInfo:
        """Accept a request and begin; its news tells how it goes on.

        Raises:
            RbeeError: it cannot work on this machine (engine, backend, device).
        """
        if not self.takes_tasks:
            raise UnavailableError("this hive is stopping", code="stopping")
        backend = request.backend or own_backend(request.engine)
        request = attrs.evolve(request, backend=backend)
        spec = self._spec(request)
        engine_kind(request.engine).check(spec)
        info = WorkerInfo(
            worker_id=spec.id, model=request.model, served_names=(request.model,),
            state=WorkerState.STARTED.value, engine=spec.engine, backend=spec.backend,
            device=spec.device, task=spec.task, owner=request.owner, node=spec.node,
            max_model_len=request.max_model_len, dtype=request.dtype,
            kv_cache_bytes=request.kv_cache_bytes, max_num_seqs=request.max_num_seqs,
            engine_args=request.engine_args, keep_alive=spec.keep_alive,
        )  # fmt: skip
        worker = Worker(info, request, self._setup.home.log_file(spec.id))
        self._workers[spec.id] = worker
        self.tasks.start_soon(self._keep, worker, spec)
        self._tell(worker)
        return info

    def _spec(self, request: StartWorker) -> WorkerSpec:
        return WorkerSpec(
            id=WorkerId(new_id("worker")), model=request.model, engine=request.engine,
            backend=request.backend or "cpu", device=request.device or "0", task=request.task,
            node=request.node or self._setup.node, owner=request.owner,
            max_model_len=request.max_model_len,
            dtype=request.dtype, kv_cache_bytes=request.kv_cache_bytes,
            max_num_seqs=request.max_num_seqs, engine_args=request.engine_args,
            keep_alive=KEEP_ALIVE if request.keep_alive is None else request.keep_alive,
        )  # fmt: skip

    async def _keep(self, worker: Worker, spec: WorkerSpec) -> None:
        """Survive a worker's failure: a dead worker is data for the hive, not a crash."""
        failure: BaseException | None = None
        try:
            try:
                await self._run(worker, spec)
            except* (RbeeError, OSError) as group:
                failure = next(leaves(group))
            await self._until_nothing_left(worker, failure)
            if worker.ending_since:
                self.cleaned.note(worker.ending_since)
            if failure is None or (as_left(failure) and worker.is_over):
                self._change(worker, state=WorkerState.STOPPED.value, error=None)
            else:
                self._fail(worker, failure)
            self.ends[worker.info.state,] += 1
        finally:
            worker.ended.set()
            self._workers.pop(worker.id, None)
            self._prune_logs()

    async def _until_nothing_left(self, worker: Worker, failure: BaseException | None) -> None:
        """Return once its processes are gone and its memory is back; until then, tell what is left.

        Its end was bounded. What goes on here is what nobody can hasten: a process that is stuck in
        the kernel ends when that lets it.
        """
        left = as_left(failure)
        while left is not None:
            if worker.info.error is None or worker.info.error.message != str(left):
                self._fail(worker, left, left.code)
            worker.ended.set()
            await trio.sleep(LEFT_AGAIN)
            left = await self._left_of(worker)

    @asynccontextmanager
    async def _verified(self, worker: Worker) -> AsyncGenerator[None, None]:
        """Raise unless nothing of a worker is left after the body, however that ends."""
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):  # bounded: a stopping hive tells what it leaves
                left = await self._left_of(worker)
            if left is not None:
                raise left

    async def _left_of(self, worker: Worker) -> RbeeError | None:
        """End what of a worker still lives; say what does not, or that nobody can tell.

        That takes `AGAIN` and `BACK` seconds at most, none if nothing is left.
        """
        try:
            await sweep(self._run_dir(worker.id), within=AGAIN)
            if worker.cards is not None:
                await worker.cards.check_back(partial(self._taken_since, worker))
        except MachineError as exc:
            return exc
        except OSError as exc:  # no descriptors
            return MachineError(
                f"whether {worker.id} has ended cannot be seen: {exc}", code=UNVERIFIED
            )
        return None

    def _taken_since(self, worker: Worker) -> int:
        """Return the bytes that others may have taken on a worker's cards since its start."""
        assert worker.cards is not None
        since = worker.cards.began
        others = (
            one for one in self._workers.values() if one is not worker and shares(one, worker)
        )
        return sum(one.plan.required for one in others if one.plan and one.ready_at > since)

    def _run_dir(self, worker_id: WorkerId) -> Path:
        return self._setup.run_dir / short_name(worker_id)

    async def _run(self, worker: Worker, spec: WorkerSpec) -> None:
        # `stop` cancels the scope: an asked-for end is silent
        with worker.scope, ExitStack() as held:
            find = partial(self._prepare, worker)
            local = await take_into_use(find, self._setup.home.models, held)
            worker.request = attrs.evolve(worker.request, hub=HubAccess())  # not needed any more
            spec = self._resolved(worker, spec, local)
            await self._take_room(worker, local)
            config = WorkerConfig(
                spec=spec,
                run_dir=str(self._run_dir(spec.id)),
                token=self._setup.token,
                host=self._setup.host,
                port=self._setup.worker_port,
                hive_url=self.url,
                grace=self._setup.grace,
            )
            self._narrate(worker)(
                "load", f"{shown(spec.model)} with {spec.engine} on {spec.backend}"
            )
            await self._look_at_cards(worker, spec)
            with trio.move_on_after(LOAD_LIMIT) as loading:
                launch = self._launch(config, worker.log_file)
                async with self._verified(worker), launch as process:
                    self._change(worker, state=WorkerState.LOADING.value, pid=process.pid)
                    status = await self._until_end(worker, process, loading)
            if loading.cancelled_caught:
                raise too_slow(spec, worker.log_file, LOAD_LIMIT)
            if not worker.unloading:
                raise died(spec, worker.log_file, status)

    async def _prepare(self, worker: Worker) -> Local | None:
        """Bring the model here while the engine is being imported."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._warm, worker)
            return await self._provision(worker.request, self._narrate(worker))

    async def _take_room(self, worker: Worker, local: Local | None) -> None:
        plan = await self._plan(local, worker.request) if local is not None else None
        if plan is not None:
            await self._room.make(plan, worker, self._narrate(worker))
        worker.plan = plan

    async def _look_at_cards(self, worker: Worker, spec: WorkerSpec) -> None:
        if spec.backend != "cpu":
            worker.cards = Cards(spec.device, self._look)
            await worker.cards.begin()

    async def _plan(self, local: Local, request: StartWorker) -> MemoryPlan | None:
        try:
            return await self._memory.plan(local, request)
        except (ArithmeticError, ValueError, RecursionError) as exc:
            raise BadInputError(
                f"the memory that {local.reference} needs cannot be counted: {exc}",
                hint=f"cat {local.directory / 'config.json'}",
            ) from exc

    async def _warm(self, worker: Worker) -> None:
        with trio.move_on_after(LOAD_LIMIT):  # the launch says what is wrong then
            await self._warm_up(worker.request.engine, self._narrate(worker))

    def _resolved(self, worker: Worker, spec: WorkerSpec, local: Local | None) -> WorkerSpec:
        if local is None:
            return spec
        names = tuple(dict.fromkeys((worker.request.model, *local.served_names)))
        self._change(worker, model=local.reference, served_names=names)
        return attrs.evolve(
            spec, model=local.reference, model_dir=str(local.directory), served_names=names
        )

    async def _until_end(self, worker: Worker, process: Process, loading: trio.CancelScope) -> int:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_lift_limit, worker.became_ready, loading)
                nursery.start_soon(self._watch, worker)
                status = await process.wait()
                nursery.cancel_scope.cancel(reason="worker ended")
            return status
        finally:
            worker.ending_since = time.monotonic()

    # events ----------------------------------------------------------------------------------
    def ready(self, message: WorkerReady) -> None:
        """Take the worker's ready callback.

        Raises:
            ConflictError: it comes too late, the worker is being stopped.
        """
        worker = self.get(message.worker_id)
        if worker.scope.cancel_called:
            raise ConflictError(f"worker {worker.id} is being stopped", code="stopping")
        pid = worker.info.pid
        if not worker.became_ready.is_set():  # it may call again if we were slow to answer
            pid = next(iter(children(pid)), 0)  # so far it was the guard's
        worker.became_ready.set()
        if worker.cards is not None:
            worker.cards.note_tree(worker.info.pid)
        worker.seen_at = worker.ready_at = trio.current_time()
        state = WorkerState.READY.value
        self._change(
            worker, state=state, url=message.url, pid=pid, progress="", share=None,
            slots=message.slots,
        )  # fmt: skip
        log.info("worker %s ready at %s", worker.id, message.url)
        self.on_ready(worker.info)

    def take_progress(self, told: WorkerNarration) -> None:
        """Pass on what a worker's loading is at, for those who wait for it."""
        worker = self.get(told.worker_id)
        if not worker.became_ready.is_set():
            worker.info = attrs.evolve(worker.info, progress=told.text, share=told.share)
            self.news.send(told)

    async def _watch(self, worker: Worker) -> None:
        """Know whether a worker answers and works, and unload one that has had no work for long."""
        await worker.became_ready.wait()
        worker.peer = self._connect(worker.info)
        pause = PROBE
        while True:
            await trio.sleep(pause)
            seen = await self._look_at(worker)
            if seen is None and await _is_dead(worker):
                raise outlived(worker.id, worker.info.node)
            left = _left(seen)
            if left <= 0:
                await self._unload(worker, f"no work for {worker.idle:.0f} s")
            pause = min(PROBE, max(left, AGAIN))

    async def _look_at_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for worker in list(self._workers.values()):
                nursery.start_soon(self._look_at, worker)

    async def _look_at(self, worker: Worker) -> ReadyState | None:
        seen = await worker.peer.state() if worker.peer is not None else None
        if worker.state in (WorkerState.READY, WorkerState.UNRESPONSIVE):
            self._note(worker, seen)
        return seen

    def _note(self, worker: Worker, seen: ReadyState | None) -> None:
        state = WorkerState.UNRESPONSIVE if seen is None else WorkerState.READY
        if state is not worker.state:
            log.warning("worker %s is %s", worker.id, state.value)
        worker.is_fresh = worker.is_fresh if seen is None else seen.is_fresh
        before = worker.info
        told = {} if seen is None else _figures(seen)
        worker.info = attrs.evolve(before, state=state.value, **told)
        worker.seen_at = trio.current_time()
        if attrs.evolve(worker.info, idle=before.idle) != before:  # that it is idle still, is none
            self._tell(worker)

    def _fail(
        self, worker: Worker, error: BaseException, state: str = WorkerState.FAILED.value
    ) -> None:
        if not isinstance(error, RbeeError):
            error = RbeeError(f"{type(error).__name__}: {error}")
        log.warning("worker %s %s: %s", worker.id, state, error)
        detail = ErrorDetail(error.code, error.message, error.hint, error.details)
        self._change(worker, state=state, error=detail)

    def _change(self, worker: Worker, **changes: Any) -> None:
        worker.info = attrs.evolve(worker.info, **changes)
        self._tell(worker)

    def _tell(self, worker: Worker) -> None:
        self.news.send(worker.info)

    def _narrate(self, worker: Worker) -> Narrate:
        def narrate(action: str, text: str, *, share: float | None = None) -> None:
            # progress comes twice a second: the log can do without
            level = logging.INFO if share is None else logging.DEBUG
            log.log(level, "worker %s: %s %s", worker.id, action, text)
            self.news.send(WorkerNarration(worker.id, "hive", action, text, share))

        return narrate

    # stopping --------------------------------------------------------------------------------
    async def stop(self, worker_id: str) -> None:
        """Stop one worker and return when nothing of it is left.

        Raises:
            RbeeError: something is, or nobody can tell (`rbee.remains.LEFT`).
        """
        worker = self.get(worker_id)
        self._begin_stop(worker)
        await worker.ended.wait()
        if worker.info.state in LEFT and (error := worker.info.error) is not None:
            raise from_wire(error.code, error.message, hint=error.hint, details=error.details)

    async def stop_owned_by(self, owner: str) -> None:
        """Stop an owner's workers side by side and return when they have ended."""
        mine = [worker for worker in self._workers.values() if worker.info.owner == owner]
        for worker in mine:
            self._begin_stop(worker)
        for worker in mine:
            await worker.ended.wait()

    async def _unload(self, worker: Worker, why: str) -> bool:
        """Stop a worker that nobody uses; False if it is at work after all."""
        if worker.peer is None or worker.is_asked or worker.state is not WorkerState.READY:
            return False
        worker.is_asked = worker.unloading = True
        try:
            worker.unloading = await worker.peer.stop_if_idle()
        except RbeeError as exc:  # it may have heard: if it ends now, that is not unasked
            log.warning("worker %s is not unloaded: %s", worker.id, exc)
            return False
        finally:
            worker.is_asked = False
        if not worker.unloading:
            return False
        log.info("worker %s is unloaded: %s", worker.id, why)
        self._begin_stop(worker)
        await worker.ended.wait()
        return worker.info.state not in LEFT

    async def _make_idle_go(self, worker: Tenant) -> bool:
        assert isinstance(worker, Worker)
        return await self._unload(worker, "its memory is needed")

    def _begin_stop(self, worker: Worker) -> None:
        if worker.ended.is_set():  # what is left of it is being ended all the time
            return
        if worker.cards is not None:
            worker.cards.note_tree(worker.info.pid)
        self._change(worker, state=WorkerState.STOPPING.value)
        worker.scope.cancel(reason="asked to stop")

    def _prune_logs(self) -> None:
        running = {worker.log_file.name for worker in self._workers.values()}
        prune_logs(self._setup.home.logs, "worker", running=running)


def _left(seen: ReadyState | None) -> float:
    """Return the seconds until a worker is to be unloaded if nobody uses it."""
    if seen is None or seen.running or seen.keep_alive < 0:
        return float("inf")
    return max(seen.keep_alive, FIRST_USE if seen.is_fresh else 0) - seen.idle


def _figures(seen: ReadyState) -> dict[str, Any]:
    return {"running": seen.running, "idle": seen.idle, "keep_alive": seen.keep_alive}


async def _is_dead(worker: Worker) -> bool:
    """Tell whether its process has ended but its guard goes on: something of it does not end."""
    pid = worker.info.pid
    if not pid or start_time(pid):
        return False
    await trio.sleep(GUARD_ENDS)
    return not start_time(pid)


async def _lift_limit(ready: trio.Event, scope: trio.CancelScope) -> None:
    await ready.wait()
    scope.deadline = float("inf")
