"""Our concurrency vocabulary: services that outlive their users, and watchers that cancel."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import trio

from rbee import guard

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
    """Cancel ``scope`` at the first stop signal and swallow the later ones.

    A SIGHUP that was ignored when we started (nohup) stays ignored.
    """

    on_the_way_out = False

    def stop(number: int) -> None:
        nonlocal on_the_way_out
        on_the_way_out = True
        name = signal.Signals(number).name
        if reason is not None and not reason.signal:
            reason.signal = number
        log.info("%s received", name)
        scope.cancel(reason=name)

    numbers = _stop_signals()
    with (
        _noted(numbers, lambda: on_the_way_out) as early,
        trio.open_signal_receiver(*numbers) as signals,
    ):
        guard.release_interrupt()
        task_status.started()
        for number in early:
            stop(number)
        async for number in signals:
            stop(number)


def _stop_signals() -> list[signal.Signals]:
    ignores_hup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignores_hup]


@contextmanager
def _noted(numbers: Iterable[signal.Signals], is_ending: Callable[[], bool]) -> Iterator[list[int]]:
    """Take what arrives around trio's receiver: what that has not given out, it raises again.

    In a process that is ending they stay ignored: the default handler would change its exit code.
    """
    noted: list[int] = []
    before = {number: signal.signal(number, lambda n, _: noted.append(n)) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if is_ending() else handler)


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


class TaskOwner:
    """An object whose tasks live in a nursery of its own, from `open` to the end of its body."""

    _tasks: trio.Nursery | None = None

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        """Hold the tasks; leaving cancels them all, side by side, and waits for them."""
        async with trio.open_nursery() as nursery:
            self._tasks = nursery
            try:
                yield
            finally:
                nursery.cancel_scope.cancel(reason="their owner stops")

    @property
    def tasks(self) -> trio.Nursery:
        assert self._tasks is not None, "used outside of open()"
        return self._tasks

    @property
    def takes_tasks(self) -> bool:
        return self._tasks is not None and not self._tasks.cancel_scope.cancel_called
