"""The worker's routes; everything else is the engine's own API."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import trio

from rbee import __version__
from rbee.errors import (
    BadInputError,
    CancelledError,
    ConflictError,
    NotFoundError,
    RbeeError,
    UnavailableError,
)
from rbee.home import default_root
from rbee.metrics import CONTENT_TYPE, scrape
from rbee.model import WorkerConfig, WorkerState, new_id
from rbee.trace import REQUEST_ID, current
from rbee.web.out import Receive, Send
from rbee.web.requests import Requests
from rbee.web.router import App, Emit, Request, Response, Scope, Stream, json_response
from rbee.wire import messages
from rbee.wire.messages import ExecuteRequest, Health, ReadyState, StopWorker
from rbee.worker.engine import Engine
from rbee.worker.execute import Execution
from rbee.worker.jobs import Jobs
from rbee.worker.limits import check_request
from rbee.worker.metrics import Figures, collect_state

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

log = logging.getLogger(__name__)


@attrs.define(eq=False)
class Worker:
    """What this process is doing: the one thing its routes and its lifetime share."""

    config: WorkerConfig
    state: WorkerState = WorkerState.LOADING
    progress: str = "starting"
    share: float | None = None
    jobs: Jobs = attrs.field(factory=Jobs)
    figures: Figures = attrs.field(factory=Figures)
    stop_asked: trio.Event = attrs.field(factory=trio.Event)
    keep_alive: float = attrs.Factory(lambda worker: worker.config.spec.keep_alive, takes_self=True)
    _engine: Engine | None = None

    def report(self, text: str, share: float | None = None) -> None:
        """Note what the loading is at; the share of a step never falls."""
        if text == self.progress and share is not None and self.share is not None:
            share = max(share, self.share)
        self.progress, self.share = text, share

    def begin(self, engine: Engine) -> None:
        """Take work from now on."""
        self._engine = engine
        self.jobs = Jobs()  # the idle time begins now
        self.state, self.progress, self.share = WorkerState.READY, "", None

    def end(self, state: WorkerState, error: RbeeError) -> None:
        """Take no more work; every job ends with ``error``."""
        self.state, self.progress = state, error.message
        self.jobs.end_all(error)

    def ask_to_stop(self) -> None:
        if self.state is not WorkerState.FAILED:
            self.state, self.progress = WorkerState.STOPPING, "asked to stop"
        self.stop_asked.set()

    def ready_state(self) -> ReadyState:
        """Tell how it stands, for the hive that may unload it."""
        return ReadyState(
            self.config.spec.id, self.state.value, self.progress, self.share,
            running=len(self.jobs), idle=self.jobs.idle(), keep_alive=self.keep_alive,
            is_fresh=not self.jobs.had_any,
        )  # fmt: skip

    @property
    def engine(self) -> Engine:
        """The engine, if this worker takes work."""
        if self.state is WorkerState.READY and self._engine is not None:
            return self._engine
        code = "starting" if self.state is WorkerState.LOADING else f"worker_{self.state.value}"
        raise UnavailableError(
            f"worker {self.config.spec.id} takes no work: it is {self.state.value}"
            + (f" ({self.progress})" if self.progress else ""),
            code=code,
        )

    def engine_figures(self) -> tuple[int, str]:
        if self._engine is None:
            return 0, ""
        return self._engine.running(), self._engine.metrics()


def make_app(worker: Worker) -> App:
    hosts = {worker.config.host, socket.gethostname().lower()}
    app = App(token=worker.config.token, hosts=hosts, fallback=partial(call_engine_app, worker))
    app.add("GET", messages.HEALTH, partial(health, worker), is_open=True)
    app.add("GET", messages.READY, partial(ready, worker))
    app.add("POST", messages.EXECUTE, partial(execute, worker))
    app.add("DELETE", messages.EXECUTE + "/{job_id}", partial(cancel, worker))
    app.add("POST", messages.SHUTDOWN, partial(shutdown, worker))
    app.add("GET", messages.METRICS, partial(metrics, worker, app.requests))
    return app


async def health(worker: Worker, request: Request) -> Response:
    spec = worker.config.spec
    return json_response(
        Health(
            component="llm-worker-rbee",
            id=spec.id,
            version=__version__,
            owner=spec.owner or "operator",
            home=str(default_root()),
            pid=os.getpid(),
            state=worker.state.value,
        )
    )


async def ready(worker: Worker, request: Request) -> Response:
    check_addressee(worker, request.headers)
    state = worker.ready_state()
    if worker.state is WorkerState.READY:
        return json_response(state)
    return attrs.evolve(json_response(state, 503), headers=((b"retry-after", b"1"),))


async def execute(worker: Worker, request: Request) -> Stream:
    engine = worker.engine
    if worker.config.spec.task != "generate":
        raise BadInputError(
            f"worker {worker.config.spec.id} has the task {worker.config.spec.task}, "
            "it generates nothing",
            hint="POST /v1/embeddings",
        )
    check_addressee(worker, request.headers)
    body = await request.read(ExecuteRequest)
    if not body.job_id:
        body = attrs.evolve(body, job_id=new_id("job"))
    check_request(body)
    if body.keep_alive is not None:
        worker.keep_alive = body.keep_alive
    execution = Execution(engine, body, worker.config.spec, worker.jobs, worker.figures)

    async def run(emit: Emit) -> None:
        _ = worker.engine  # it may have been told to stop while the body came
        await execution.run(emit)

    name = messages.JOB_ID_HEADER.encode()
    return Stream(run, ((name, body.job_id.encode("ascii")),))


def check_addressee(worker: Worker, headers: Mapping[bytes, bytes]) -> None:
    """Refuse what was meant for a worker that had this port before us."""
    meant = headers.get(messages.WORKER_ID_HEADER.encode(), b"").decode("latin-1")
    if meant not in ("", worker.config.spec.id):
        raise ConflictError(
            f"this is worker {worker.config.spec.id}, not {meant[:100]}", code="other_worker"
        )


async def cancel(worker: Worker, request: Request) -> Response:
    job_id = request.params["job_id"]
    worker.jobs.end(job_id, CancelledError(f"job {job_id} was cancelled"))
    return Response(status=204)


async def shutdown(worker: Worker, request: Request) -> Response:
    check_addressee(worker, request.headers)
    asked = await request.read(StopWorker) if b"content-type" in request.headers else StopWorker()
    if asked.if_idle and worker.jobs:
        raise ConflictError(
            f"worker {worker.config.spec.id} is at {len(worker.jobs)} requests", code="worker_busy"
        )
    worker.ask_to_stop()
    return Response(status=202)


async def metrics(worker: Worker, requests: Requests, request: Request) -> Response:
    running, theirs = worker.engine_figures()

    def collect() -> Iterable[Metric]:
        yield from collect_state(
            worker.config.spec,
            ready=worker.state is WorkerState.READY,
            jobs_running=len(worker.jobs),
            engine_running=running,
        )
        yield from worker.figures.collect()
        yield from requests.collect("worker")

    return Response(theirs.encode() + await scrape(collect), content_type=CONTENT_TYPE)


async def call_engine_app(worker: Worker, scope: Scope, receive: Receive, send: Send) -> None:
    """Hand a request to the engine's own app; like a job, it ends when the worker does.

    The app gets the id that the answer and our log have, also where it came with none.
    """
    check_addressee(worker, dict(scope["headers"]))
    others = [pair for pair in scope["headers"] if pair[0] != REQUEST_ID]
    scope = {**scope, "headers": [*others, (REQUEST_ID, current().id.encode())]}
    app = worker.engine.app
    if app is None:
        raise NotFoundError(f"no route {scope['method']} {scope['path']}")
    answered = False

    async def note(message: Any) -> None:
        nonlocal answered
        answered = True
        await send(message)

    with worker.jobs.open(new_id("api")) as job:
        try:
            with job.scope:
                await app(scope, receive, note)
            if job.error is not None:
                raise job.error
        except Exception:
            if not answered:
                raise
            # The answer ends without its last chunk, which tells the client that it was cut.
            log.warning("%s %s was cut short", scope["method"], scope["path"], exc_info=True)
