"""The SDK client of a queen.

The reading of a job's events (`TaskEvents`) does no I/O, so that clients for other styles of
concurrency share it; `AsyncClient` is the one for trio.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any
from urllib.parse import quote

from rbee.errors import OwnerGoneError, PeerError, RbeeError, from_wire
from rbee.model import LOCALHOST
from rbee.web.exchange import Address, Exchange, open_exchange
from rbee.wire import codec, messages, sse

NarrateAsync = Callable[[messages.Narration], Awaitable[None]]

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
    return from_wire(event.code, event.message, hint=hint, details=event.details)


class TaskStream:
    """Iterate a job's events as they come; ends after ``end``.

    Iterating raises the job's error, `PeerError` if the stream breaks off, and `OwnerGoneError`
    if it breaks off at a queen that somebody's command owns: it has ended with that command.
    """

    def __init__(self, exchange: Exchange, owner: str = "") -> None:
        self._exchange = exchange
        self._owner = owner
        self._decoder = sse.Decoder()
        self._pairs: deque[tuple[str, str]] = deque()
        self._events = TaskEvents(exchange.headers.get(messages.JOB_ID_HEADER, ""))

    @property
    def job_id(self) -> str:
        return self._events.job_id

    def __aiter__(self) -> TaskStream:
        return self

    async def __anext__(self) -> messages.Event:
        while not self._events.ended:
            event = self._events.event(*await self.next_pair())
            if event is not None:
                return event
        raise StopAsyncIteration

    async def next_pair(self) -> tuple[str, str]:
        """Return the next event as it came."""
        try:
            while not self._pairs:
                chunk = await self._exchange.chunk()
                if not chunk:
                    raise self._events.broken_off()
                self._pairs.extend(self._decoder.feed(chunk))
            return self._pairs.popleft()
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
        self._address = Address.parse(self.url)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
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
        """Every call closes its own connection: nothing is left to do."""

    @asynccontextmanager
    async def _open(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> AsyncGenerator[Exchange, None]:
        if body:
            headers["content-type"] = "application/json"
        async with open_exchange(
            self._address,
            method,
            path,
            headers={**self._headers, **headers},
            body=body,
            what=self._what,
        ) as exchange:
            if exchange.status >= 400:
                raise error_of(exchange.status, await exchange.body())
            yield exchange

    async def _call(self, method: str, path: str, kind: Any, message: Any = None) -> Any:
        sent = b"" if message is None else codec.dumps(message)
        async with self._open(method, path, sent) as exchange:
            body = await exchange.body()
        return codec.loads(body, kind) if kind is not None else None

    async def _narrated(
        self, path: str, message: Any, kind: type[Any], narrate: NarrateAsync | None
    ) -> Any:
        """Have something done that takes its time; its last event is a ``kind`` or an error."""
        accept, body = sse.CONTENT_TYPE.decode(), codec.dumps(message)
        async with self._open("POST", path, body, accept=accept) as exchange:
            stream = TaskStream(exchange, self._owner)
            while True:
                name, data = await stream.next_pair()
                if name == kind.__name__.lower():
                    return codec.loads(data, kind)
                event = sse.event_from(name, data)
                if isinstance(event, messages.Error):
                    raise _error_of(event)
                if isinstance(event, messages.Narration) and narrate:
                    await narrate(event)

    @asynccontextmanager
    async def stream(self, task: messages.TaskRequest) -> AsyncGenerator[TaskStream, None]:
        """Start a job; leaving the block before its end cancels it."""
        accept = sse.CONTENT_TYPE.decode()
        async with self._open("POST", messages.TASKS, codec.dumps(task), accept=accept) as exchange:
            yield TaskStream(exchange, self._owner)

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

    async def start_worker(self, start: messages.StartWorker) -> messages.WorkerInfo:
        """Have a worker started; it is on its way when this returns."""
        info: messages.WorkerInfo = await self._call(
            "POST", messages.QUEEN_WORKERS, messages.WorkerInfo, start
        )
        return info

    async def start_ready_worker(
        self, start: messages.StartWorker, narrate: NarrateAsync | None = None
    ) -> messages.WorkerInfo:
        """Have a worker started and wait until it is ready; it goes on when this is cancelled.

        Raises:
            RbeeError: it did not become ready, and why.
        """
        info: messages.WorkerInfo = await self._narrated(
            messages.QUEEN_WORKERS, start, messages.WorkerInfo, narrate
        )
        return info

    async def explain_start(self, start: messages.StartWorker) -> list[messages.NodeChoice]:
        """Ask where a worker would be started, the best node first, and why."""
        choices: list[messages.NodeChoice] = await self._call(
            "POST", messages.QUEEN_EXPLAIN, list[messages.NodeChoice], start
        )
        return choices

    async def stop_worker(self, worker_id: str) -> None:
        """Stop a worker; nothing of it is left when this returns.

        Raises:
            NotFoundError: there is none of that name, or no more.
        """
        await self._call("DELETE", f"{messages.QUEEN_WORKERS}/{quote(worker_id, safe='')}", None)

    async def start_hive(self, node: str, narrate: NarrateAsync | None = None) -> messages.HiveInfo:
        """Have a hive run on a node; one that does already is fine. Cancelling gives it up."""
        info: messages.HiveInfo = await self._narrated(
            messages.QUEEN_HIVES, messages.StartHive(node), messages.HiveInfo, narrate
        )
        return info

    async def stop_hive(self, node: str) -> None:
        """End a node's hive and its workers; nothing of them is left when this returns.

        Raises:
            ConflictError: an operator's hive is not the queen's to end.
        """
        await self._call("DELETE", f"{messages.QUEEN_HIVES}/{quote(node, safe='')}", None)

    async def nodes(self) -> list[messages.NodeInfo]:
        """List this cluster's machines; ``localhost``, the queen's own, is the first."""
        found: list[messages.NodeInfo] = await self._call(
            "GET", messages.QUEEN_NODES, list[messages.NodeInfo]
        )
        return found

    async def node(self, name: str) -> messages.NodeInfo:
        """Describe one node; raise `NotFoundError` if there is none of that name."""
        info: messages.NodeInfo = await self._call("GET", _node(name), messages.NodeInfo)
        return info

    async def add_node(self, node: messages.AddNode) -> messages.NodeInfo:
        """Have the queen try a node and register it, as ``unusable`` if it lacks only our rbee;
        nothing is kept of one that fails otherwise.
        """
        info: messages.NodeInfo = await self._call(
            "POST", messages.QUEEN_NODES, messages.NodeInfo, node
        )
        return info

    async def update_node(self, name: str, update: messages.UpdateNode) -> messages.NodeInfo:
        """Change what ``update`` gives of a node's entry."""
        info: messages.NodeInfo = await self._call("PATCH", _node(name), messages.NodeInfo, update)
        return info

    async def remove_node(self, name: str) -> None:
        """Forget a node; raise `NotFoundError` if there is none of that name."""
        await self._call("DELETE", _node(name), None)

    async def hives(self) -> list[messages.HiveInfo]:
        found: list[messages.HiveInfo] = await self._call(
            "GET", messages.QUEEN_HIVES, list[messages.HiveInfo]
        )
        return found

    async def models(self) -> list[messages.ModelInfo]:
        """List the models on the disks of all nodes."""
        found: list[messages.ModelInfo] = await self._call(
            "GET", messages.QUEEN_MODELS, list[messages.ModelInfo]
        )
        return found

    async def pull(
        self, request: messages.PullModel, narrate: NarrateAsync | None = None
    ) -> messages.Pulled:
        """Have a model on a node's disk; ``narrate`` gets what happens, cancelling ends it."""
        pulled: messages.Pulled = await self._narrated(
            messages.QUEEN_MODELS, request, messages.Pulled, narrate
        )
        return pulled

    async def remove_model(self, name: str, *, node: str = LOCALHOST) -> None:
        """Remove a model, by its record's name, from a node's disk unless a worker uses it."""
        place = "/".join(quote(part, safe="") for part in (node, name))
        await self._call("DELETE", f"{messages.QUEEN_MODELS}/{place}", None)

    async def shutdown(self) -> None:
        """Order the queen to end; it has acknowledged, not ended, when this returns."""
        await self._call("POST", messages.SHUTDOWN, None)


def _node(name: str) -> str:
    return f"{messages.QUEEN_NODES}/{quote(name, safe='')}"


def error_of(status: int, body: bytes) -> RbeeError:
    """Rebuild the error that a queen refused with."""
    try:
        error = json.loads(body)["error"]
        return from_wire(
            str(error.get("code", "")),
            str(error["message"]),
            hint=str(error.get("hint", "")),
            status=status,
            details=error.get("details") or {},
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return from_wire("", f"{status}: {body[:200].decode('utf-8', 'replace')}", status=status)
