"""The queen's HTTP routes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial

import attrs

from rbee import __version__
from rbee.errors import NotFoundError
from rbee.model import DEFAULT_ENGINE, WorkerId, WorkerState
from rbee.queen.aliases import Aliases
from rbee.queen.hives import Hives
from rbee.queen.jobs import Jobs
from rbee.queen.keys import Keys
from rbee.queen.machine import QueenSetup
from rbee.queen.models import Models
from rbee.queen.nodes import add_node_routes
from rbee.queen.openai import Passages, add_openai_routes
from rbee.queen.starts import Starts
from rbee.queen.tasks import add_task_routes
from rbee.web.narrated import Tell, Works
from rbee.web.openapi import add_openapi_route
from rbee.web.router import App, Gate, Request, Response, Stream, json_response
from rbee.wire import messages
from rbee.wire.messages import (
    Health,
    HiveInfo,
    PullModel,
    StartHive,
    StartWorker,
    WorkerReady,
)

log = logging.getLogger(__name__)


def make_app(
    setup: QueenSetup,
    hives: Hives,
    jobs: Jobs,
    starts: Starts,
    works: Works,
    passages: Passages,
    aliases: Aliases,
    stop: Callable[[str], None],
    allowed_origins: Sequence[str] = (),
    gate: Gate | None = None,
) -> App:
    """Wire one queen's routes; ``stop`` begins the end of the daemon, ``gate`` is `App`'s."""
    app = App(
        token=setup.token,
        hosts=(setup.host,),
        allowed_origins=allowed_origins,
        keys=Keys(setup.home.config_file),
        gate=gate,
        tells_overhead=True,
    )
    models = Models(setup.home, hives)

    async def health(request: Request) -> Response:
        return json_response(
            Health("queen", setup.id, __version__, setup.owner, str(setup.home.root), os.getpid())
        )

    async def list_hives(request: Request) -> Response:
        return json_response(hives.infos())

    async def start_hive(request: Request) -> Response | Stream:
        body = await request.read(StartHive)

        async def work(tell: Tell) -> HiveInfo:
            return (await hives.get(body.node, tell)).told()

        if request.accepts_events():
            return works.narrated(work)
        return json_response(await work(lambda narration: None))

    async def stop_hive(request: Request) -> Response:
        await hives.stop(request.params["node"])
        return Response(status=204)

    async def list_workers(request: Request) -> Response:
        return json_response(list(hives.workers))

    async def read_start(request: Request) -> StartWorker:
        body = aliases.spell_out(aliases.fill_start(await request.read(StartWorker)))
        return attrs.evolve(body, engine=body.engine or DEFAULT_ENGINE, owner=setup.id)

    async def start_worker(request: Request) -> Response | Stream:
        body = await read_start(request)
        if request.accepts_events():
            return works.narrated(partial(starts.until_ready, body))
        return json_response(await starts.ask(body, lambda narration: None), 202)

    async def explain_start(request: Request) -> Response:
        return json_response(await starts.explain(await read_start(request)))

    async def stop_worker(request: Request) -> Response:
        worker = _worker(hives, request.params["worker"])
        hive = hives.running(worker.node)
        if hive is not None:
            hives.take_info(attrs.evolve(worker, state=WorkerState.STOPPING.value))
            await hive.stop_worker(worker.worker_id)
        return Response(status=204)

    async def list_models(request: Request) -> Response:
        return json_response(await models.infos())

    async def pull_model(request: Request) -> Stream:
        body = aliases.spell_out(await request.read(PullModel))
        return works.narrated(partial(models.pull, body))

    async def remove_model(request: Request) -> Response:
        await models.remove(request.params["node"], request.params["model"])
        return Response(status=204)

    async def worker_ready(request: Request) -> Response:
        message = await request.read(WorkerReady)
        info = _worker(hives, message.worker_id)
        log.info("worker %s on %s called back: it is ready", info.worker_id, info.node)
        if hive := hives.running(info.node):
            await hives.take_ready(hive, message)
        return Response(status=204)

    async def shutdown(request: Request) -> Response:
        stop("shutdown asked for over HTTP")
        return Response(status=202)

    app.add("GET", messages.HEALTH, health, is_open=True)
    add_task_routes(app, jobs)
    add_openai_routes(app, passages)
    add_node_routes(app, setup.home, hives.machines.probe)
    app.add("GET", messages.QUEEN_HIVES, list_hives)
    app.add("POST", messages.QUEEN_HIVES, start_hive)
    app.add("DELETE", messages.QUEEN_HIVES + "/{node}", stop_hive)
    app.add("GET", messages.QUEEN_WORKERS, list_workers)
    app.add("POST", messages.QUEEN_WORKERS, start_worker)
    app.add("POST", messages.QUEEN_EXPLAIN, explain_start)
    app.add("DELETE", messages.QUEEN_WORKERS + "/{worker}", stop_worker)
    app.add("GET", messages.QUEEN_MODELS, list_models)
    app.add("POST", messages.QUEEN_MODELS, pull_model)
    app.add("DELETE", messages.QUEEN_MODELS + "/{node}/{model}", remove_model)
    app.add("POST", messages.QUEEN_WORKER_READY, worker_ready)
    app.add("POST", messages.SHUTDOWN, shutdown)
    add_openapi_route(app, "queen")
    return app


def _worker(hives: Hives, worker_id: str) -> messages.WorkerInfo:
    info = hives.workers.get(WorkerId(worker_id))
    if info is None:
        raise NotFoundError(
            f"no worker {worker_id!r}", code="unknown_worker", hint="rbee-keeper worker list"
        )
    return info
