"""From a worker's configuration to its guarded process: forked from a zygote, or executed."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol

import trio

from rbee.hive.zygotes import CannotForkError, Zygote
from rbee.home import writing
from rbee.model import WorkerConfig
from rbee.models.access import TOKENLESS
from rbee.process import Process, open_guarded
from rbee.sweep import sweep
from rbee.wire import codec

log = logging.getLogger(__name__)


class Launcher(Protocol):
    """Run one worker while the body runs; afterwards nothing of it is left."""

    def __call__(
        self, config: WorkerConfig, log_file: Path
    ) -> AbstractAsyncContextManager[Process]: ...


def fork_or_exec(get_zygote: Callable[[str], Awaitable[Zygote]]) -> Launcher:
    """Make the launcher that forks from the engine's zygote and executes where it must not."""

    @asynccontextmanager
    async def launch(config: WorkerConfig, log_file: Path) -> AsyncGenerator[Process, None]:
        zygote = await get_zygote(config.spec.engine)
        async with AsyncExitStack() as stack:
            try:
                forked = fork_worker(zygote, config, log_file)
                process = await stack.enter_async_context(forked)
            except CannotForkError as exc:
                log.warning("%s: executing the worker instead, which starts slower", exc)
                process = await stack.enter_async_context(exec_worker(config, log_file))
            yield process

    return launch


@asynccontextmanager
async def fork_worker(
    zygote: Zygote, config: WorkerConfig, log_file: Path
) -> AsyncGenerator[Process, None]:
    """Run a worker forked from ``zygote`` while the body runs.

    Raises:
        CannotForkError: execute it instead; nothing of the try is left.
    """
    process: Process | None = None
    try:
        process = await _fork(zygote, config, log_file)
        yield process
    finally:
        try:
            # Bounded: the guard inside kills at its grace.
            with trio.move_on_after(config.grace.worker_guard + 6, shield=True):
                if process is not None:
                    await process.stop(config.grace.worker_guard + 0.5)
                await sweep(Path(config.run_dir))
        finally:  # also if something of it does not end
            if process is not None:
                process.close()


async def _fork(zygote: Zygote, config: WorkerConfig, log_file: Path) -> Process:
    plan = {
        "name": "worker-guard",
        "grace": config.grace.worker_guard,
        "record": config.run_dir,
        "remove": [config.run_dir],
        "log": str(log_file),
    }
    with writing(log_file.parent):
        _make_run_dir(config)
        log_fd = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        return await zygote.fork(plan, config, log_fd)
    finally:
        os.close(log_fd)


@asynccontextmanager
async def exec_worker(config: WorkerConfig, log_file: Path) -> AsyncGenerator[Process, None]:
    """Run ``llm-worker-rbee --owned``: the same contract without a zygote, slower to start."""
    _make_run_dir(config)
    async with open_guarded(
        [sys.executable, "-m", "rbee.worker", "--owned"],
        first=f"start {codec.dumps(config).decode()}",
        graces=[config.grace.worker_guard],
        log_file=log_file,
        env=TOKENLESS,
        run_dir=Path(config.run_dir),
        die_with_us=True,
        hold_interrupt=True,
    ) as (process, _):
        yield process


def _make_run_dir(config: WorkerConfig) -> None:
    run_dir = Path(config.run_dir)
    with writing(run_dir):
        run_dir.mkdir(mode=0o700, parents=True)
