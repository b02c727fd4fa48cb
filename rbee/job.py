"""A job that belongs to nobody, as a client holds it: it goes on whoever leaves.

Its events are numbered. `JobEvents` knows the last one that it has given out, and goes on behind it
when its connection was cut.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from rbee.errors import OwnerGoneError, PeerError, UnavailableError
from rbee.stream import Answer, TaskStream
from rbee.web.exchange import Exchange
from rbee.web.transport import Pause
from rbee.wire import messages

if TYPE_CHECKING:
    from rbee.client import AsyncClient

WAITS = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)  # seconds before each try to go on, as long as none succeeds

Reopen = Callable[[int], Awaitable[Exchange | None]]
"""Asks for the events after one of a number; None if there are none and will be none."""


class JobEvents(TaskStream):
    """Iterate a job's events from its first one, or from behind ``last_seen``; ends after ``end``.

    Leaving it does nothing to the job. A connection that was cut is made again for some seconds.

    Iterating raises the job's error; `GoneError` if what comes next is not kept any more;
    `UnavailableError` or `PeerError` if the queen stays out of reach.

    Attributes:
        last_seen: the number of the last event that was given out.
    """

    def __init__(
        self, reopen: Reopen, pause: Pause, job_id: str, last_seen: int = 0, owner: str = ""
    ) -> None:
        super().__init__(self._start_behind, owner)
        self._reopen = reopen
        self._pause = pause
        self._events.job_id = job_id
        self._failures = 0
        self._owner_gone: OwnerGoneError | None = None
        self.last_seen = last_seen

    async def __aenter__(self) -> JobEvents:
        return self

    def __aiter__(self) -> JobEvents:
        return self

    async def _start_behind(self) -> Exchange:
        exchange = await self._reopen(self.last_seen)
        if exchange is None:
            raise StopAsyncIteration
        return exchange

    async def _next_pair(self) -> tuple[str, str]:
        while True:
            try:
                pair = await super()._next_pair()
            except (PeerError, UnavailableError) as error:
                await self._recover(error)
                continue
            self._failures = 0
            self.last_seen = self._pairs.last_id or self.last_seen
            return pair

    async def _recover(self, error: PeerError | UnavailableError) -> None:
        """Be ready to try again, unless that was done often enough."""
        if isinstance(error, UnavailableError) and error.code != "unreachable":
            raise error
        if isinstance(error, OwnerGoneError):
            self._owner_gone = error
        if self._failures == len(WAITS):
            raise self._owner_gone or error
        wait = WAITS[self._failures]
        self._failures += 1
        if self._exchange is not None:
            self._exchange.abort()
            self._exchange = None
        await self._pause(wait)


class AsyncJob:
    """A job of `AsyncClient.enqueue`; it is held by nothing but its ``id``."""

    def __init__(self, client: AsyncClient, job_id: str) -> None:
        self._client = client
        self.id = job_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def events(self, last_seen: int = 0) -> JobEvents:
        """Return the job's events, those after a number; ask as often as you like."""
        return self._client.job_events(self.id, last_seen)

    async def result(self) -> Answer:
        """Wait for the whole answer; cancelling leaves the job as it is.

        Raises:
            RbeeError: the job's own error.
            GoneError: it has ended too long ago, or has said more than is kept (1 MiB).
        """
        async with self.events() as events:
            async for _ in events:
                pass
            return events.answer

    async def status(self) -> messages.TaskInfo:
        """Ask how it stands; raise `GoneError` if it is not kept any more."""
        return await self._client.job_status(self.id)

    async def cancel(self) -> None:
        """End it; one that has ended is fine."""
        await self._client.cancel_job(self.id)
