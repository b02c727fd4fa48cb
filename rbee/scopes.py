"""Our concurrency vocabulary: services that outlive their users, and watchers that cancel."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@asynccontextmanager
async def open_service(
    async_fn: Callable[..., Awaitable[object]], *args: object
) -> AsyncGenerator[Any, None]:
    """Run a startable beside the body and stop it only after the body."""
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def run(*, task_status: trio.TaskStatus[object]) -> None:
            with scope:
                await async_fn(*args, task_status=task_status)

        value = await nursery.start(run)  # still cancellable from outside
        scope.shield = True  # from here on the body goes first
        try:
            yield value
        finally:
            scope.cancel()


class StopReason:
    """Which signal, if any, ended a daemon or a command."""

    signal: int = 0


async def cancel_on_signal(
    scope: trio.CancelScope,
    reason: StopReason | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Cancel ``scope`` at the first stop signal and swallow the later ones."""
    with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
        task_status.started()
        async for number in signals:
            name = signal.Signals(number).name
            if reason is not None and not reason.signal:
                reason.signal = number
            log.info("%s received", name)
            scope.cancel(reason=name)


async def cancel_when(
    wait: Callable[[], Awaitable[object]],
    scope: trio.CancelScope,
    why: str,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Cancel ``scope`` as soon as ``wait()`` returns."""
    task_status.started()
    await wait()
    log.info("stopping: %s", why)
    scope.cancel(reason=why)
