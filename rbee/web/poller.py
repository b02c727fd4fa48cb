"""One trio task that watches many descriptors on an epoll of its own.

What is ready is handled by plain calls, without a task switch: for a token that has to be passed
on that switch would cost more than all the rest.
"""

from __future__ import annotations

import logging
import select
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress

import trio

from rbee.scopes import open_service

log = logging.getLogger(__name__)

IN, OUT = select.EPOLLIN, select.EPOLLOUT
HUNG_UP = select.EPOLLRDHUP
BATCH = 512

Ready = Callable[[int], None]
"""Takes the events of a descriptor. It may be called without any: of one that had its number."""


class Poller:
    """Watches descriptors; made by `open_poller`."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._ready: dict[int, Ready] = {}

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, fd: int, events: int, ready: Ready) -> None:
        """Call ``ready`` as long as there are events; an error or a hang-up always is one."""
        self._epoll.register(fd, events)
        self._ready[fd] = ready

    def change(self, fd: int, events: int, ready: Ready | None = None) -> None:
        """Watch for other events, or have another take them, unless it was removed."""
        if fd in self._ready:
            self._epoll.modify(fd, events)
            self._ready[fd] = ready or self._ready[fd]

    def remove(self, fd: int) -> None:
        """Cease to watch; must come before the descriptor is closed. Twice does no harm."""
        if self._ready.pop(fd, None) is not None:
            with suppress(OSError):
                self._epoll.unregister(fd)

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        ready = self._ready
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fd, events in self._epoll.poll(0, BATCH):
                if (call := ready.get(fd)) is not None:
                    self._call(call, fd, events)

    def _call(self, call: Ready, fd: int, events: int) -> None:
        try:
            call(events)
        except Exception:  # of one stream: the others go on
            log.exception("descriptor %d could not be handled", fd)
            self.remove(fd)


@asynccontextmanager
async def open_poller() -> AsyncGenerator[Poller, None]:
    """Watch until the body has ended; whoever adds a descriptor removes it."""
    with select.epoll() as epoll:
        poller = Poller(epoll)
        async with open_service(poller._run):
            yield poller
