"""The SDK client of a queen.

The reading of a job's events (`TaskEvents`) does no I/O, so that clients for other styles of
concurrency share it; `AsyncClient` is the one for trio.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

from rbee.errors import OwnerGoneError, PeerError, RbeeError, from_wire
from rbee.web.client import EventStream, call, open_client, open_events
from rbee.wire import messages, sse

OPERATOR = "operator"
KEEP_A_QUEEN = "rbee-keeper queen start   # a queen that does not end with somebody's command"


class TaskEvents:
    """Turn a job's ``(name, data)`` pairs into typed events and hold it to its one terminal event.

    ``job_id`` is "" until the first event that tells it.
    """

    def __init__(self, job_id: str = "") -> None:
        self.job_id = job_id
        self.ended = False

    def event(self, name: str, data: str) -> messages.Event | None:
        """Return the event, or None for one to skip; raise the error that an ``error`` carries."""
        event = sse.event_from(name, data)
        if isinstance(event, messages.Error):
            self.ended = True
            raise _error_of(event)
        if isinstance(event, messages.End):
            self.ended = True
        elif isinstance(event, messages.Queued | messages.Started):
            self.job_id = self.job_id or event.job_id
        return event

    def broken_off(self) -> PeerError:
        """Return the error for bytes that end before the job does."""
        return PeerError("stream ended without a terminal event", code="stream_broken")


def _error_of(event: messages.Error) -> RbeeError:
    hint = event.hint
    if event.code == OwnerGoneError.code and not hint:
        hint = KEEP_A_QUEEN
    return from_wire(event.code, event.message, hint=hint)


class TaskStream:
    """Iterate a job's events as they come; ends after ``end``.

    Iterating raises the job's error, `PeerError` if the stream breaks off, and `OwnerGoneError`
    if it breaks off at a queen that somebody's command owns: it has ended with that command.
    """

    def __init__(self, stream: EventStream, owner: str = "") -> None:
        self._stream = stream
        self._owner = owner
        self._events = TaskEvents(stream.headers.get(messages.JOB_ID_HEADER, ""))

    @property
    def job_id(self) -> str:
        return self._events.job_id

    def __aiter__(self) -> TaskStream:
        return self

    async def __anext__(self) -> messages.Event:
        while not self._events.ended:
            event = self._events.event(*await self._next_pair())
            if event is not None:
                return event
        raise StopAsyncIteration

    async def _next_pair(self) -> tuple[str, str]:
        try:
            pair = await anext(self._stream, None)
            if pair is None:
                raise self._events.broken_off()
            return pair
        except PeerError as exc:
            if self._owner in ("", OPERATOR):
                raise
            raise OwnerGoneError(
                f"the queen ended with its owner {self._owner} before the answer did ({exc})",
                hint=KEEP_A_QUEEN,
            ) from exc


class AsyncClient:
    """Talk to a running queen from trio.

    Calls raise `RbeeError`: what the queen refused, `UnavailableError` when nobody answers,
    `PeerError` when the connection breaks. No call but connecting has a time limit: wrap it in
    ``trio.fail_after``.
    """

    def __init__(self, url: str, token: str = "") -> None:
        self.url = url.rstrip("/")
        self._http = open_client(self.url, token)
        self._what = f"queen-rbee at {self.url}"
        self._owner = ""

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def _call(self, method: str, path: str, kind: Any) -> Any:
        return await call(self._http, method, path, kind, what=self._what)

    @asynccontextmanager
    async def stream(self, task: messages.TaskRequest) -> AsyncGenerator[TaskStream, None]:
        """Start a job; leaving the block before its end cancels it."""
        async with open_events(
            self._http, "POST", messages.TASKS, task, what=self._what
        ) as stream:
            yield TaskStream(stream, self._owner)

    async def health(self) -> messages.Health:
        """Ask who it is; from then on a broken stream is told as what it means."""
        health: messages.Health = await self._call("GET", messages.HEALTH, messages.Health)
        self._owner = health.owner
        return health

    async def workers(self) -> list[messages.WorkerInfo]:
        found: list[messages.WorkerInfo] = await self._call(
            "GET", messages.QUEEN_WORKERS, list[messages.WorkerInfo]
        )
        return found

    async def hives(self) -> list[messages.HiveInfo]:
        found: list[messages.HiveInfo] = await self._call(
            "GET", messages.QUEEN_HIVES, list[messages.HiveInfo]
        )
        return found

    async def models(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self._call(
            "GET", messages.QUEEN_MODELS, list[dict[str, Any]]
        )
        return found

    async def shutdown(self) -> None:
        """Order the queen to end; it has acknowledged, not ended, when this returns."""
        await self._call("POST", messages.SHUTDOWN, type(None))
