"""The SDK client of a queen, for trio and asyncio; `rbee.blocking` has the one for neither.

No call but connecting has a time limit: wrap it in ``trio.fail_after`` or ``asyncio.timeout``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack
from urllib.parse import quote

from rbee.job import AsyncJob, JobEvents
from rbee.model import LOCALHOST
from rbee.running import find_access
from rbee.stream import (
    KEEP_A_QUEEN,
    OPERATOR,
    Answer,
    PairStream,
    TaskEvents,
    TaskOptions,
    TaskStream,
    error_of_event,
)
from rbee.web.exchange import Address, Exchange, open_exchange, start_exchange
from rbee.web.transport import Connect, Pause, connect, pause
from rbee.wire import codec, messages, sse
from rbee.wire.messages import Message, TaskRequest
from rbee.wire.refusal import error_of

__all__ = ["KEEP_A_QUEEN", "OPERATOR", "AsyncClient", "TaskEvents", "TaskStream"]

if TYPE_CHECKING:
    from rbee.cluster import ClusterOptions

NarrateAsync = Callable[[messages.Narration], Awaitable[None]]
Said = Message | Mapping[str, str]
"""One message of a conversation, such as ``{"role": "user", "content": "Hello"}``."""


def task_for(
    model: str | TaskRequest,
    prompt: str | None,
    messages: Iterable[Said] | None,
    options: TaskOptions,
) -> TaskRequest:
    """Make the request that the arguments of `AsyncClient.stream` say."""
    if isinstance(model, TaskRequest):
        return model
    said = None if messages is None else tuple(map(_message, messages))
    return TaskRequest(model, prompt, said, **options)


def _message(said: Said) -> Message:
    return said if isinstance(said, Message) else Message(said["role"], said["content"])


class AsyncClient:
    """Talk to a running queen from trio or asyncio.

    Calls raise `RbeeError`: what the queen refused, `UnavailableError` when nobody answers,
    `PeerError` when the connection breaks.

    Args:
        url: of the queen; None is ``RBEE_QUEEN_URL``, else the one that runs for the home.
        token: None takes the home's or that queen's, where it is this machine's.
        home: None is ``RBEE_HOME``, else ``~/.rbee``.

    Raises:
        UnavailableError: no ``url`` is given and no queen runs.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        home: Path | str | None = None,
        connect: Connect = connect,
        pause: Pause = pause,
    ) -> None:
        access = find_access(url, token, home=home)
        self.url = access.url
        self.token = access.token
        self._address = Address.parse(self.url)
        self._headers = {"authorization": f"Bearer {access.token}"} if access.token else {}
        self._what = f"queen-rbee at {self.url}"
        self._owner = access.owner
        self._connect = connect
        self._pause = pause

    @classmethod
    @asynccontextmanager
    async def ephemeral(
        cls, **options: Unpack[ClusterOptions]
    ) -> AsyncGenerator[AsyncClient, None]:
        """Own a cluster while the body runs; ``options`` are those of `rbee.open_cluster`.

        Under trio its queen runs in this task's nursery, under asyncio in a thread of its own.
        """
        from sniffio import current_async_library

        if current_async_library() == "trio":
            from rbee.cluster import open_cluster

            async with open_cluster(**options) as cluster:
                yield cluster.client
        else:
            from rbee.beside_asyncio import open_beside_asyncio

            async with open_beside_asyncio(options) as beside:
                yield cls(beside.url, beside.token)

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
        async with open_exchange(
            self._address, method, path, headers=self._headers_for(body, headers), body=body,
            what=self._what, connect=self._connect,
        ) as exchange:  # fmt: skip
            yield await _accepted(exchange)

    def _headers_for(self, body: bytes, headers: Mapping[str, str]) -> dict[str, str]:
        media = {"content-type": "application/json"} if body else {}
        return {**self._headers, **headers, **media}

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
            pairs = PairStream(exchange, self._owner)
            while True:
                name, data = await pairs.next()
                if name == kind.__name__.lower():
                    return codec.loads(data, kind)
                event = sse.event_from(name, data)
                if isinstance(event, messages.Error):
                    raise error_of_event(event)
                if isinstance(event, messages.Narration) and narrate:
                    await narrate(event)

    def stream(
        self,
        model: str | TaskRequest,
        prompt: str | None = None,
        *,
        messages: Iterable[Said] | None = None,
        **options: Unpack[TaskOptions],
    ) -> TaskStream:
        """Return a job's stream of events: iterate it, or use it in ``async with``.

        Leaving it before its end cancels the job.
        """
        return self._stream(task_for(model, prompt, messages, options))

    def _stream(self, task: TaskRequest) -> TaskStream:
        body = codec.dumps(task)

        async def start() -> Exchange:
            headers = self._headers_for(body, {"accept": sse.CONTENT_TYPE.decode()})
            exchange = await start_exchange(
                self._address, "POST", messages.TASKS, headers=headers, body=body,
                what=self._what, connect=self._connect,
            )  # fmt: skip
            try:
                return await _accepted(exchange)
            except BaseException:
                exchange.abort()
                raise

        return TaskStream(start, self._owner)

    async def infer(
        self,
        model: str | TaskRequest,
        prompt: str | None = None,
        *,
        messages: Iterable[Said] | None = None,
        **options: Unpack[TaskOptions],
    ) -> Answer:
        """Return the whole answer to a prompt; cancelling cancels the job."""
        async with self.stream(model, prompt, messages=messages, **options) as events:
            async for _ in events:
                pass
            return events.answer

    async def chat(
        self, model: str, messages: Iterable[Said], **options: Unpack[TaskOptions]
    ) -> Answer:
        """Return the next answer of a conversation; cancelling cancels the job."""
        return await self.infer(model, messages=messages, **options)

    # jobs that belong to nobody ---------------------------------------------------------------
    async def enqueue(
        self,
        model: str | TaskRequest,
        prompt: str | None = None,
        *,
        messages: Iterable[Said] | None = None,
        **options: Unpack[TaskOptions],
    ) -> AsyncJob:
        """Have a prompt answered whether or not anybody waits for it.

        The job ends by its end, its ``deadline`` or `AsyncJob.cancel`, and with the queen. What it
        said is kept for 60 s after its end.

        Raises:
            QueueFullError: there is no room for more.
        """
        return await self._enqueue(task_for(model, prompt, messages, options))

    async def _enqueue(self, task: TaskRequest) -> AsyncJob:
        body = codec.dumps(task)
        async with self._open("POST", messages.TASKS, body, prefer="respond-async") as exchange:
            accepted = codec.loads(await exchange.body(), messages.TaskAccepted)
        return AsyncJob(self, accepted.job_id)

    def job(self, job_id: str) -> AsyncJob:
        """Return a job of that id, whoever enqueued it."""
        return AsyncJob(self, job_id)

    async def jobs(self) -> list[messages.TaskInfo]:
        """List the jobs that the queen knows, the oldest first."""
        found: list[messages.TaskInfo] = await self._call(
            "GET", messages.TASKS, list[messages.TaskInfo]
        )
        return found

    async def job_status(self, job_id: str) -> messages.TaskInfo:
        """Ask how a job stands; raise `GoneError` or `NotFoundError` if it is not known."""
        info: messages.TaskInfo = await self._call("GET", _task(job_id), messages.TaskInfo)
        return info

    async def cancel_job(self, job_id: str) -> None:
        """End a job; one that has ended, or never was, is fine."""
        await self._call("DELETE", _task(job_id), None)

    def job_events(self, job_id: str, last_seen: int = 0) -> JobEvents:
        """Return the events of a job, those after a number."""

        async def reopen(seen: int) -> Exchange | None:
            return await self._start_events(job_id, seen)

        return JobEvents(reopen, self._pause, job_id, last_seen, self._owner)

    async def _start_events(self, job_id: str, seen: int) -> Exchange | None:
        wanted = {"accept": sse.CONTENT_TYPE.decode(), "last-event-id": str(seen)}
        headers = self._headers_for(b"", wanted)
        exchange = await start_exchange(
            self._address, "GET", _task(job_id) + "/events", headers=headers, what=self._what,
            connect=self._connect,
        )  # fmt: skip
        if exchange.status == 200:
            return exchange
        try:
            await _accepted(exchange)
        finally:
            exchange.abort()
        return None

    # what there is ----------------------------------------------------------------------------
    async def health(self) -> messages.Health:
        """Ask who it is; from then on a broken stream is told as what it means."""
        health: messages.Health = await self._call("GET", messages.HEALTH, messages.Health)
        self._owner = health.owner
        return health

    async def workers(self) -> list[messages.WorkerInfo]:
        """List the workers that the queen has asked for."""
        found: list[messages.WorkerInfo] = await self._call(
            "GET", messages.QUEEN_WORKERS, list[messages.WorkerInfo]
        )
        return found

    async def start_worker(
        self,
        start: messages.StartWorker,
        narrate: NarrateAsync | None = None,
        *,
        wait: bool = True,
    ) -> messages.WorkerInfo:
        """Have a worker started; ``narrate`` gets what happens until it is ready.

        It goes on when this is cancelled.

        Args:
            wait: False returns once it is on its way, and tells nothing of that.

        Raises:
            RbeeError: it did not become ready, and why.
        """
        path, kind = messages.QUEEN_WORKERS, messages.WorkerInfo
        info: messages.WorkerInfo = (
            await self._narrated(path, start, kind, narrate)
            if wait
            else await self._call("POST", path, kind, start)
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

    async def start_hive(
        self, node: str = LOCALHOST, narrate: NarrateAsync | None = None
    ) -> messages.HiveInfo:
        """Have a hive run on a node; one that does already is fine. Cancelling gives it up."""
        info: messages.HiveInfo = await self._narrated(
            messages.QUEEN_HIVES, messages.StartHive(node), messages.HiveInfo, narrate
        )
        return info

    async def stop_hive(self, node: str = LOCALHOST) -> None:
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
        """List the hives that run, and those that have ended with something left."""
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


async def _accepted(exchange: Exchange) -> Exchange:
    if exchange.status >= 400:
        raise error_of(exchange.status, await exchange.body())
    return exchange


def _task(job_id: str) -> str:
    return f"{messages.TASKS}/{quote(job_id, safe='')}"


def _node(name: str) -> str:
    return f"{messages.QUEEN_NODES}/{quote(name, safe='')}"
