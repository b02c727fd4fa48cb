"""The hive's HTTP routes."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import attrs

from rbee import __version__
from rbee.devices import devices
from rbee.errors import ConflictError, NotFoundError
from rbee.hive.catalog import list_catalog, remove_here, stream_pull
from rbee.hive.metrics import add_metrics
from rbee.hive.owners import Owners
from rbee.hive.pulse import Pulse
from rbee.hive.workers import HiveSetup, Workers
from rbee.model import DEFAULT_ENGINE
from rbee.process import log_tail
from rbee.web.openapi import add_openapi_route
from rbee.web.router import App, Emit, Request, Response, Stream, json_response
from rbee.wire import messages, sse
from rbee.wire.messages import (
    Health,
    OwnerLease,
    PullModel,
    StartWorker,
    WorkerIds,
    WorkerNarration,
    WorkerReady,
)

LOG_BYTES = 64 * 1024
OPERATOR = "operator"


def make_app(
    setup: HiveSetup,
    workers: Workers,
    owners: Owners,
    pulse: Pulse,
    stop: Callable[[str], None],
) -> App:
    """Wire one hive's routes; ``stop`` begins the end of the daemon."""
    app = App(token=setup.token, hosts=(setup.host,))

    async def health(request: Request) -> Response:
        return json_response(
            Health("hive", setup.id, __version__, setup.owner, str(setup.home.root), os.getpid())
        )

    async def list_workers(request: Request) -> Response | Stream:
        if request.accepts_events():
            return Stream(_news(workers, pulse))
        return json_response(workers.infos())

    async def start_worker(request: Request) -> Response:
        body = await request.read(StartWorker)
        body = attrs.evolve(body, engine=body.engine or DEFAULT_ENGINE)
        if setup.owner == OPERATOR and body.owner and owners.get(body.owner) is None:
            raise ConflictError(  # nobody would end its worker
                f"queen {body.owner} has no lease on this hive",
                code="no_lease",
                hint=f"PUT {messages.HIVE_OWNERS}/{body.owner}",
            )
        return json_response(workers.start(body), 202)

    async def stop_worker(request: Request) -> Response:
        await workers.stop(request.params["worker"])
        return Response(status=204)

    async def worker_ready(request: Request) -> Response:
        workers.ready(await request.read(WorkerReady))
        return Response(status=204)

    async def worker_progress(request: Request) -> Response:
        workers.take_progress(await request.read(WorkerNarration))
        return Response(status=204)

    async def renew_owner(request: Request) -> Response:
        owners.renew(request.params["queen"], await request.read(OwnerLease))
        return Response(status=204)

    async def end_owner(request: Request) -> Response:
        owners.end(request.params["queen"])
        return Response(status=204)

    async def list_models(request: Request) -> Response:
        return json_response(await list_catalog(setup.home, setup.node))

    async def pull_model(request: Request) -> Stream:
        return stream_pull(setup.home, await request.read(PullModel))

    async def remove_model(request: Request) -> Response:
        await remove_here(setup.home, request.params["model"])
        return Response(status=204)

    async def list_devices(request: Request) -> Response:
        return json_response(devices())

    async def show_log(request: Request) -> Response:
        return _log_of(setup, request.params["worker"])

    async def shutdown(request: Request) -> Response:
        stop("shutdown asked for over HTTP")
        return Response(status=202)

    app.add("GET", messages.HEALTH, health, is_open=True)
    app.add("GET", messages.HIVE_WORKERS, list_workers)
    app.add("POST", messages.HIVE_WORKERS, start_worker)
    app.add("POST", messages.HIVE_WORKER_READY, worker_ready)
    app.add("POST", messages.HIVE_WORKER_PROGRESS, worker_progress)
    app.add("DELETE", messages.HIVE_WORKERS + "/{worker}", stop_worker)
    app.add("PUT", messages.HIVE_OWNERS + "/{queen}", renew_owner)
    app.add("DELETE", messages.HIVE_OWNERS + "/{queen}", end_owner)
    app.add("GET", messages.HIVE_DEVICES, list_devices)
    app.add("GET", messages.HIVE_MODELS, list_models)
    app.add("POST", messages.HIVE_MODELS, pull_model)
    app.add("DELETE", messages.HIVE_MODELS + "/{model}", remove_model)
    app.add("GET", messages.HIVE_LOGS + "/{worker}", show_log)
    app.add("POST", messages.SHUTDOWN, shutdown)
    add_openapi_route(app, "hive")
    add_metrics(app, workers, pulse)
    return app


def _news(workers: Workers, pulse: Pulse) -> Callable[[Emit], Awaitable[None]]:
    """Make the stream of a hive's news: all its workers now, then every change and heartbeat."""

    async def run(emit: Emit) -> None:
        with workers.news.subscribe() as news:
            infos = workers.infos()
            await emit(sse.encode(WorkerIds(tuple(info.worker_id for info in infos))))
            for info in infos:
                await emit(sse.encode(info))
            await emit(sse.encode(pulse.heartbeat()))
            async for item in news:
                await emit(sse.encode(item))

    return run


def _log_of(setup: HiveSetup, worker: str) -> Response:
    path = setup.home.log_file(worker)
    if not worker.startswith("worker-") or "/" in worker or not path.exists():
        raise NotFoundError(
            f"no log of worker {worker!r} on {setup.node}", hint="rbee-keeper worker list"
        )
    return Response(log_tail(path, LOG_BYTES).encode(), content_type=b"text/plain; charset=utf-8")
