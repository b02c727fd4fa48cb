"""The hive's workers: one lifetime each, and the one object that owns them."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import attrs
import trio

from rbee.broadcast import Broadcast
from rbee.errors import (
    ChildExitedError,
    ConflictError,
    NotFoundError,
    RbeeError,
    UnavailableError,
    from_wire,
    leaves,
)
from rbee.guard import children
from rbee.hive.launch import Launcher
from rbee.home import Home, short_name
from rbee.model import Grace, WorkerConfig, WorkerId, WorkerSpec, WorkerState, new_id
from rbee.models.reference import shown
from rbee.process import Process, child_exited, log_tail
from rbee.scopes import TaskOwner
from rbee.web.client import keep_probing, open_client
from rbee.wire.messages import (
    ErrorDetail,
    StartWorker,
    WorkerInfo,
    WorkerNarration,
    WorkerReady,
)
from rbee.worker.engine import engine_kind

log = logging.getLogger(__name__)

LOAD_LIMIT = 600.0  # seconds from the launch to the ready callback
KEPT_LOGS = 30

News = WorkerInfo | WorkerNarration
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


Narrate = Callable[[str, str], None]
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
    queen_url: str = ""
    token_file: Path | None = None
    grace: Grace = attrs.field(factory=Grace)


@attrs.define(eq=False)
class Worker:
    """One worker from the request to its end."""

    info: WorkerInfo
    request: StartWorker
    log_file: Path
    ended: trio.Event = attrs.field(factory=trio.Event)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    became_ready: trio.Event = attrs.field(factory=trio.Event)

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
    ) -> None:
        self._setup = setup
        self._launch = launch
        self._provision = provision
        self._warm_up = warm_up
        self._workers: dict[WorkerId, Worker] = {}
        self.url = ""
        self.news: Broadcast[News] = Broadcast()
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
        spec = self._spec(request)
        engine_kind(request.engine).check(spec)
        info = WorkerInfo(
            worker_id=spec.id, model=request.model, served_names=(request.model,),
            state=WorkerState.STARTED.value, engine=spec.engine, backend=spec.backend,
            device=spec.device, owner=request.owner, node=self._setup.node,
            max_model_len=request.max_model_len, dtype=request.dtype,
            kv_cache_bytes=request.kv_cache_bytes, max_num_seqs=request.max_num_seqs,
            engine_args=request.engine_args,
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
            node=self._setup.node, owner=request.owner, max_model_len=request.max_model_len,
            dtype=request.dtype, kv_cache_bytes=request.kv_cache_bytes,
            max_num_seqs=request.max_num_seqs, engine_args=request.engine_args,
        )  # fmt: skip

    async def _keep(self, worker: Worker, spec: WorkerSpec) -> None:
        """Survive a worker's failure: a dead worker is data for the hive, not a crash."""
        try:
            await self._run(worker, spec)
        except* (RbeeError, OSError) as group:
            self._fail(worker, next(leaves(group)))
        finally:
            worker.ended.set()
            self._workers.pop(worker.id, None)
            self._prune_logs()

    async def _run(self, worker: Worker, spec: WorkerSpec) -> None:
        with worker.scope:  # `stop` cancels it: an asked-for end is silent
            local = await self._prepare(worker)
            spec = self._resolved(worker, spec, local)
            config = WorkerConfig(
                spec=spec,
                run_dir=str(self._setup.run_dir / short_name(spec.id)),
                token=self._setup.token,
                host=self._setup.host,
                port=self._setup.worker_port,
                hive_url=self.url,
                grace=self._setup.grace,
            )
            self._narrate(worker)(
                "load", f"{shown(spec.model)} with {spec.engine} on {spec.backend}"
            )
            with trio.move_on_after(LOAD_LIMIT) as loading:
                async with self._launch(config, worker.log_file) as process:
                    self._change(worker, state=WorkerState.LOADING.value, pid=process.pid)
                    status = await self._until_end(worker, process, loading)
            if loading.cancelled_caught:
                raise _too_slow(worker)
            raise _died(worker, status)
        self._change(worker, state=WorkerState.STOPPED.value)

    async def _prepare(self, worker: Worker) -> Local | None:
        """Bring the model here while the engine is being imported."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._warm, worker)
            return await self._provision(worker.request, self._narrate(worker))

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
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_lift_limit, worker.became_ready, loading)
            nursery.start_soon(self._probe, worker)
            status = await process.wait()
            nursery.cancel_scope.cancel(reason="worker ended")
        return status

    # events ----------------------------------------------------------------------------------
    def ready(self, message: WorkerReady) -> None:
        """Take the worker's ready callback.

        Raises:
            ConflictError: it comes too late, the worker is being stopped.
        """
        worker = self.get(message.worker_id)
        if worker.scope.cancel_called:
            raise ConflictError(f"worker {worker.id} is being stopped", code="stopping")
        worker.became_ready.set()
        pid = next(iter(children(worker.info.pid)), 0)  # so far it was the guard's
        state = WorkerState.READY.value
        self._change(worker, state=state, url=message.url, pid=pid, progress="", share=None)
        log.info("worker %s ready at %s", worker.id, message.url)
        self.on_ready(worker.info)

    def take_progress(self, told: WorkerNarration) -> None:
        """Pass on what a worker's loading is at, for those who wait for it."""
        worker = self.get(told.worker_id)
        if not worker.became_ready.is_set():
            worker.info = attrs.evolve(worker.info, progress=told.text, share=told.share)
            self.news.send(told)

    async def _probe(self, worker: Worker) -> None:
        await worker.became_ready.wait()

        def tell(answers: bool) -> None:
            state = WorkerState.READY if answers else WorkerState.UNRESPONSIVE
            log.warning("worker %s is %s", worker.id, state.value)
            self._change(worker, state=state.value)

        async with open_client(worker.info.url, self._setup.token) as client:
            await keep_probing(client, tell)

    def _fail(self, worker: Worker, error: BaseException) -> None:
        if not isinstance(error, RbeeError):
            error = RbeeError(f"{type(error).__name__}: {error}")
        log.warning("worker %s failed: %s", worker.id, error)
        detail = ErrorDetail(error.code, error.message, error.hint, error.details)
        self._change(worker, state=WorkerState.FAILED.value, error=detail)

    def _change(self, worker: Worker, **changes: Any) -> None:
        worker.info = attrs.evolve(worker.info, **changes)
        self._tell(worker)

    def _tell(self, worker: Worker) -> None:
        self.news.send(worker.info)

    def _narrate(self, worker: Worker) -> Narrate:
        def narrate(action: str, text: str) -> None:
            log.info("worker %s: %s %s", worker.id, action, text)
            self.news.send(WorkerNarration(worker.id, "hive", action, text))

        return narrate

    # stopping --------------------------------------------------------------------------------
    async def stop(self, worker_id: str) -> None:
        """Stop one worker and return when nothing of it is left."""
        worker = self.get(worker_id)
        self._begin_stop(worker)
        await worker.ended.wait()

    async def stop_owned_by(self, owner: str) -> None:
        """Stop an owner's workers side by side and return when nothing of them is left."""
        mine = [worker for worker in self._workers.values() if worker.info.owner == owner]
        for worker in mine:
            self._begin_stop(worker)
        for worker in mine:
            await worker.ended.wait()

    def _begin_stop(self, worker: Worker) -> None:
        self._change(worker, state=WorkerState.STOPPING.value)
        worker.scope.cancel(reason="asked to stop")

    def _prune_logs(self) -> None:
        """Keep the newest logs of workers that have ended; other hives may be at it as well."""
        running = {worker.log_file.name for worker in self._workers.values()}
        logs = [(_modified(path), path) for path in self._setup.home.logs.glob("worker-*.log*")]
        for _, path in sorted(logs)[:-KEPT_LOGS]:
            if path.name.removesuffix(".1") not in running:
                path.unlink(missing_ok=True)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _too_slow(worker: Worker) -> RbeeError:
    return UnavailableError(
        f"worker {worker.id} was not ready within {LOAD_LIMIT:g} s",
        code="load_timeout",
        hint=f"rbee-keeper logs --worker {worker.id}",
        log=log_tail(worker.log_file),
    )


async def _lift_limit(ready: trio.Event, scope: trio.CancelScope) -> None:
    await ready.wait()
    scope.deadline = float("inf")


def _died(worker: Worker, status: int) -> RbeeError:
    """Make the error of a worker that ended unasked; it may have said why on its log."""
    tail = log_tail(worker.log_file, 8000)
    for line in reversed(tail.splitlines()):
        _, found, text = line.partition("rbee-error ")
        if found and (said := _said(text)):
            told = [line for line in tail.splitlines() if "rbee-error " not in line]
            said.details.setdefault("log", "\n".join(told)[-2000:])
            return said
    error: ChildExitedError = child_exited(f"worker {worker.id}", status, worker.log_file)
    error.hint = f"rbee-keeper logs --worker {worker.id}"
    return error


def _said(text: str) -> RbeeError | None:
    try:
        detail = json.loads(text)
        return from_wire(
            detail["code"], detail["message"], hint=detail.get("hint", ""),
            details=detail.get("details") or {},
        )  # fmt: skip
    except (ValueError, KeyError, TypeError):
        return None
