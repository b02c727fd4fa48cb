"""A worker's lifetime: HTTP first, then the engine, one canary token, the ready callback, work.

HTTP is a service around the engine, so every stream gets its terminal event before it goes.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

import httpx
import setproctitle
import trio

from rbee.errors import ChildExitedError, PeerError, RbeeError, UnavailableError, leaves
from rbee.hints import logs_of
from rbee.log import configure_logging
from rbee.model import WorkerConfig, WorkerState, new_id
from rbee.scopes import cancel_on_signal, cancel_when, open_service
from rbee.web.client import call, open_client
from rbee.web.listener import open_listener
from rbee.web.server import serve_http
from rbee.wire import codec, messages
from rbee.wire.messages import ErrorDetail, ExecuteRequest, WorkerNarration, WorkerReady
from rbee.worker import pdeath
from rbee.worker.app import Worker, make_app
from rbee.worker.engine import Engine, EngineKind, engine_kind

log = logging.getLogger(__name__)

TITLE = "llm-worker-rbee"
CANARY_LIMIT = 120.0  # a first token may compile kernels
TELL_DELAYS = (0.0, 0.2, 0.4, 0.8, 1.6, *[3.2] * 100)  # a frozen hive may thaw
TELL_LIMIT = 5.0  # seconds for the hive's answer
TELL_EVERY = 0.25  # seconds between two looks at the progress; a quick start tells none
ENDING = 0.5  # seconds in which jobs send their terminal event; also HTTP's own grace


def run_worker(config: WorkerConfig, *, lifeline: int | None) -> int:
    """Be the worker until told to stop; return the exit code.

    Stops at a signal, at ``POST /v1/admin/shutdown`` and at the end of ``lifeline``. A failure
    leaves ``rbee-error {json}`` as last line on stderr. The caller flushes and leaves with
    ``os._exit``: an engine's thread may be stuck, and torch takes seconds to tear down.
    """
    setproctitle.setproctitle(TITLE)
    configure_logging(TITLE)
    pdeath.protect_forks(*([] if lifeline is None else [lifeline]))
    try:
        trio.run(_run, config, lifeline)
    except BaseException as exc:
        return _report(exc)
    log.info("worker %s ended", config.spec.id)
    return 0


async def _run(config: WorkerConfig, lifeline: int | None) -> None:
    root = trio.CancelScope()
    # The watcher outlives the cleanup: a second SIGTERM must not meet the default handler.
    async with open_service(cancel_on_signal, root):
        with root:
            async with trio.open_nursery() as nursery:
                if lifeline is not None:
                    gone = partial(wait_eof, lifeline)
                    nursery.start_soon(cancel_when, gone, root, "the lifeline has ended")
                await serve(config)
                nursery.cancel_scope.cancel(reason="worker finished")


async def wait_eof(fd: int) -> None:
    """Return at the end of a pipe; what comes before it is dropped."""
    os.set_blocking(fd, False)
    while True:
        await trio.lowlevel.wait_readable(fd)
        if not os.read(fd, 65536):
            return


def _report(exc: BaseException) -> int:
    error = next((leaf for leaf in leaves(exc) if isinstance(leaf, RbeeError)), None)
    if error is None:
        log.error("ended by a bug", exc_info=exc)
        error = RbeeError(f"{type(exc).__name__}: {exc}")
    log.error("%s", error)
    detail = ErrorDetail(error.code, error.message, error.hint, error.details)
    sys.stderr.write(f"rbee-error {codec.dumps(detail).decode()}\n")
    sys.stderr.flush()
    return error.exit_code


async def serve(
    config: WorkerConfig, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run a worker until cancelled or asked to stop; started with its URL when it is ready.

    Raises:
        RbeeError: the engine cannot be loaded, or the hive refuses the ready callback.
        ChildExitedError: the engine died (code ``engine_died``).
    """
    kind = engine_kind(config.spec.engine)
    kind.check(config.spec)
    worker = Worker(config)
    listener = open_listener(config.host, config.port, exact=False)
    http = partial(serve_http, stall_limit=config.stall_limit, grace=ENDING)
    async with open_service(http, make_app(worker), listener) as url:
        log.info("worker %s answers at %s, loading %s", config.spec.id, url, config.spec.model)
        async with trio.open_nursery() as nursery:
            asked = worker.stop_asked.wait
            nursery.start_soon(cancel_when, asked, nursery.cancel_scope, "asked to stop")
            if config.hive_url:
                nursery.start_soon(tell_progress, worker)
            await _run_engine(worker, kind, url, task_status)


async def _run_engine(
    worker: Worker, kind: EngineKind, url: str, task_status: trio.TaskStatus[str]
) -> None:
    config, began = worker.config, time.monotonic()
    async with open_engine(worker, kind) as engine, trio.open_nursery() as nursery:
        nursery.start_soon(_end_with_engine, worker, engine)
        worker.report("generating one token")
        await generate_canary(engine, config)
        worker.begin(engine)
        log.info("worker %s ready after %.1f s", config.spec.id, time.monotonic() - began)
        if config.hive_url:
            await tell_hive(config, url, engine.slots)
        task_status.started(url)
        await trio.sleep_forever()


@asynccontextmanager
async def open_engine(worker: Worker, kind: EngineKind) -> AsyncGenerator[Engine, None]:
    """Load the engine; at the end every job gets its terminal event before the engine goes."""
    config = worker.config
    async with kind.open(config.spec, run_dir=config.run_dir, progress=worker.report) as engine:
        try:
            yield engine
        finally:
            if worker.state is not WorkerState.FAILED:
                log.info("worker %s is stopping", config.spec.id)
                stopping = UnavailableError("the worker is stopping", code="worker_stopping")
                worker.end(WorkerState.STOPPING, stopping)
            # Cleanup: bounded, for a client that does not read gets no terminal event.
            with trio.move_on_after(ENDING, shield=True):
                await worker.jobs.wait_empty()


async def _end_with_engine(worker: Worker, engine: Engine) -> None:
    why = await engine.wait_dead()
    spec = worker.config.spec
    hint = logs_of(spec.id, spec.node)
    doing = f" during: {worker.progress}" if worker.progress else ""
    error = ChildExitedError(f"{spec.model}: {why}{doing}", code="engine_died", hint=hint)
    log.error("worker %s: %s", spec.id, why)
    worker.end(WorkerState.FAILED, error)
    raise error


async def generate_canary(engine: Engine, config: WorkerConfig) -> None:
    """Generate one token: an engine that has loaded may still be unable to."""
    if config.spec.task != "generate":
        return
    request = ExecuteRequest(new_id("canary"), prompt="Hi", raw=True, max_tokens=1, temperature=0.0)
    with trio.move_on_after(CANARY_LIMIT):
        try:
            async with engine.generate(request) as generation:
                async for chunks in generation:
                    if any(chunk.finish for chunk in chunks):
                        return
        except PeerError as exc:
            if exc.code != "engine_died":
                raise
            # Its watcher, which ends us, also knows of what it died.
            await trio.sleep_forever()
    raise PeerError("the engine has loaded but generates nothing", code="canary_failed")


async def tell_progress(worker: Worker) -> None:
    """Tell the hive what the loading is at, until it is over; what it does not take is lost."""
    config, told = worker.config, None
    await trio.sleep(TELL_EVERY)
    async with open_client(config.hive_url, config.token) as client:
        while worker.state is WorkerState.LOADING:
            now = (worker.progress, worker.share)
            if now != told:
                told = now
                news = WorkerNarration(config.spec.id, "worker", "load", *now)
                await _tell_once(client, news)
            await trio.sleep(TELL_EVERY)


async def _tell_once(client: httpx.AsyncClient, news: WorkerNarration) -> None:
    path = messages.HIVE_WORKER_PROGRESS
    try:
        await call(client, "POST", path, type(None), news, what="hive", limit=TELL_LIMIT)
    except RbeeError as exc:
        log.debug("the hive did not take the progress: %s", exc)


async def tell_hive(config: WorkerConfig, url: str, slots: int = 0) -> None:
    """Send the ready callback, again while the hive is slow to answer.

    Raises:
        RbeeError: the hive refuses it or does not answer.
    """
    spec = config.spec
    ready = WorkerReady(spec.id, url, spec.model, spec.backend, spec.device, slots)
    async with open_client(config.hive_url, config.token) as client:
        for attempt, delay in enumerate(TELL_DELAYS, start=1):
            await trio.sleep(delay)
            try:
                with trio.fail_after(TELL_LIMIT):
                    await call(
                        client, "POST", messages.HIVE_WORKER_READY, type(None), ready, what="hive"
                    )
                return
            except (UnavailableError, PeerError, trio.TooSlowError) as exc:
                log.info("the hive did not take the ready callback (try %d): %s", attempt, exc)
    raise UnavailableError(
        f"the hive at {config.hive_url} did not take the ready callback in {attempt} tries",
        code="hive_unreachable",
        hint=f"curl {config.hive_url}{messages.HEALTH}",
    )
