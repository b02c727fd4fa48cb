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
MANY = 8  # ready at once, and more is likely to have come meanwhile

Ready = Callable[[int], None]
"""Takes the events of a descriptor. It may be called without any: of one that had its number."""

CLIENT_GONE = "the client has gone"
Gone = Callable[[str], None]
"""Told why a client gets no more: he has gone, or does not read."""


class Poller:
    """Watches descriptors; made by `open_poller`."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._ready: dict[int, Ready] = {}
        self._events: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, fd: int, events: int, ready: Ready) -> None:
        """Call ``ready`` as long as there are events; an error or a hang-up always is one."""
        self._epoll.register(fd, events)
        self._ready[fd] = ready
        self._events[fd] = events

    def change(self, fd: int, events: int, ready: Ready | None = None) -> None:
        """Watch for other events, or have another take them, unless it was removed."""
        if fd not in self._ready:
            return
        if self._events[fd] != events:
            self._epoll.modify(fd, events)
            self._events[fd] = events
        if ready is not None:
            self._ready[fd] = ready

    def remove(self, fd: int) -> None:
        """Cease to watch; must come before the descriptor is closed. Twice does no harm."""
        if self._ready.pop(fd, None) is not None:
            with suppress(OSError):
                self._epoll.unregister(fd)

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            # An engine has a token for each of its streams at once: the others come meanwhile.
            # Twice, then all other tasks have their turn.
            if self._call_ready() >= MANY:
                self._call_ready()

    def _call_ready(self) -> int:
        """Call for all that is ready; return of how many that was."""
        found, ready = self._epoll.poll(0, BATCH), self._ready
        for fd, events in found:
            if (call := ready.get(fd)) is not None:
                try:
                    call(events)
                except Exception:  # of one stream: the others go on
                    log.exception("descriptor %d could not be handled", fd)
                    self.remove(fd)
        return len(found)


@asynccontextmanager
async def open_poller() -> AsyncGenerator[Poller, None]:
    """Watch until the body has ended; whoever adds a descriptor removes it."""
    with select.epoll() as epoll:
        poller = Poller(epoll)
        async with open_service(poller._run):
            yield poller
