"""An asyncio loop in a thread of its own, used from trio: for vLLM and for asyncssh.

Nothing process-wide is touched: no event-loop policy, no signal handler, no patched asyncio.
The thread lives from `open_aio` to its end, because what it forks may carry PR_SET_PDEATHSIG,
which is tied to the forking thread.

Results travel by ``add_done_callback``: a task that is cancelled before its first step never runs
a line of its own, so nothing inside the coroutine can be trusted to tell trio about the end.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, TypeVar

import trio

from rbee.errors import RbeeError

log = logging.getLogger(__name__)

T = TypeVar("T")

GRACE = 1.0  # seconds that a cancelled asyncio task, or a closing loop, is waited for
ROOM = 256  # items in an outbox before `Outbox.send` waits for the reader


class AioCancelledError(RbeeError):
    """The coroutine was cancelled on the asyncio side, or the loop is closed."""

    code = "aio_cancelled"


class Bell:
    """One wake-up of trio for all outboxes that were filled since the last one."""

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self._token = token
        self._filled: deque[Outbox[Any]] = deque()
        self._rung = False

    def ring(self, outbox: Outbox[Any]) -> None:
        """Have ``outbox`` wake its reader soon; callable from any thread."""
        self._filled.append(outbox)
        if not self._rung:
            self._rung = True
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._wake)

    def _wake(self) -> None:
        self._rung = False
        while self._filled:
            self._filled.popleft()._wake()


class Outbox(Generic[T]):
    """Items from asyncio to trio, in order; many items cost one wake-up."""

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._items: deque[T] = deque()
        self._armed = False
        self._awaited: trio.Event | None = None
        self._drained: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, item: T) -> None:
        """Hand over one item; callable from any thread, never blocks."""
        self._items.append(item)
        if not self._armed:
            self._armed = True
            self._bell.ring(self)

    async def send(self, item: T) -> None:
        """Hand over one item; on the asyncio side, waits while the reader is far behind."""
        self.put(item)
        if len(self._items) > ROOM:
            drained = self._drained or (asyncio.get_running_loop(), asyncio.Event())
            self._drained = drained
            if len(self._items) > ROOM:  # else the reader came in between and saw no event
                await drained[1].wait()

    async def take(self) -> list[T]:
        """Wait until there is something and return all there is; one reader only."""
        if self._items:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            self._awaited = trio.Event()
            await self._awaited.wait()
            self._awaited = None
        taken = [self._items.popleft() for _ in range(len(self._items))]
        if (drained := self._drained) is not None:
            self._drained = None
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                drained[0].call_soon_threadsafe(drained[1].set)
        return taken

    def _wake(self) -> None:
        self._armed = False
        if self._items and self._awaited is not None:
            self._awaited.set()


class AioTask(Generic[T]):
    """One coroutine on the asyncio side, as trio sees it."""

    def __init__(self, aio: Aio) -> None:
        self._aio = aio
        self._done = trio.Event()
        self._task: asyncio.Task[T] | None = None

    def cancel(self) -> None:
        """Ask the coroutine to end; does nothing when it has."""
        self._aio.soon(self._cancel)

    async def wait(self) -> T:
        """Wait for the end and return the result or raise the error; the task runs on if
        the waiting is cancelled."""
        await self._done.wait()
        if self._task is None or self._task.cancelled():
            raise AioCancelledError("the call was cancelled on the asyncio side")
        return self._task.result()

    async def aclose(self, grace: float = GRACE) -> None:
        """Cancel it and wait until it has ended, at most ``grace`` seconds."""
        if self._done.is_set():
            return
        self.cancel()
        # Cleanup: bounded, because a loop that blocks (a model being loaded) answers late.
        with trio.move_on_after(grace, shield=True):
            await self._done.wait()

    def _start(self, async_fn: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> None:
        async def run() -> T:
            return await async_fn(*args)

        self._task = self._aio._loop.create_task(run())
        self._task.add_done_callback(self._deliver)

    def _deliver(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # marks it as seen: `wait` raises it, if anybody waits
        self._aio._tell_trio(self._done.set)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class Aio:
    """The asyncio side; made by `open_aio`."""

    _loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self._bell = Bell(self.token)
        self._up = trio.Event()
        self._down = trio.Event()
        self._failure: BaseException | None = None
        self._stop: asyncio.Event

    async def call(self, async_fn: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run a coroutine function there and return its result.

        Cancelling cancels the asyncio task and waits for its end, `GRACE` seconds at most. A
        cancelled call may have succeeded: what must be released is kept by the coroutine, in a
        place the caller sees.
        """
        task = self.spawn(async_fn, *args)
        try:
            return await task.wait()
        finally:
            await task.aclose()

    def spawn(self, async_fn: Callable[..., Awaitable[T]], *args: Any) -> AioTask[T]:
        """Start a coroutine function there; the caller closes the task."""
        task: AioTask[T] = AioTask(self)
        if not self.soon(task._start, async_fn, args):
            task._done.set()
        return task

    def soon(self, fn: Callable[..., object], *args: Any) -> bool:
        """Run a plain function in the loop's thread, in order; False if the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(fn, *args)
        except RuntimeError:
            return False
        return True

    def outbox(self) -> Outbox[Any]:
        return Outbox(self._bell)

    def _tell_trio(self, fn: Callable[[], object]) -> None:
        with suppress(trio.RunFinishedError):
            self.token.run_sync_soon(fn)

    def _run(self, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(self._main())
        except BaseException as exc:
            self._failure = exc
        finally:
            self._tell_trio(self._up.set)
            self._tell_trio(self._down.set)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._tell_trio(self._up.set)
        await self._stop.wait()


def _loop_factory(uvloop: bool) -> Callable[[], asyncio.AbstractEventLoop]:
    if uvloop:
        with suppress(ImportError):
            from uvloop import new_event_loop

            return new_event_loop  # type: ignore[no-any-return]
    return asyncio.new_event_loop


@asynccontextmanager
async def open_aio(
    *, name: str = "asyncio", uvloop: bool = True, grace: float = GRACE
) -> AsyncGenerator[Aio, None]:
    """Run an asyncio loop in a thread for the length of the body.

    At the end all its tasks are cancelled. A loop that is blocked longer than ``grace`` seconds
    is left behind with its (daemon) thread; a program that may see that ends with ``os._exit``.
    """
    aio = Aio()
    thread = threading.Thread(
        target=aio._run, args=(_loop_factory(uvloop),), name=name, daemon=True
    )
    thread.start()
    await _wait_shielded(aio._up, 30)
    if aio._failure is not None:
        raise aio._failure
    try:
        yield aio
    finally:
        aio.soon(aio._stop.set)
        if not await _wait_shielded(aio._down, grace):
            log.warning("the asyncio thread %r is blocked and is left behind", name)


async def _wait_shielded(event: trio.Event, seconds: float) -> bool:
    """Starting and ending a thread is not cancellable, but bounded."""
    with trio.move_on_after(seconds, shield=True):
        await event.wait()
    return event.is_set()
