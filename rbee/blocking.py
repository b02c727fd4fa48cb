"""The SDK client for programs without a loop: plain scripts, notebooks, threads.

It is `AsyncClient` over a transport that blocks: its coroutines never suspend, so one step runs
them to their end. There is no thread and no loop in here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from rbee.client import AsyncClient, NarrateAsync, Said
from rbee.job import AsyncJob
from rbee.job import JobEvents as AsyncJobEvents
from rbee.model import LOCALHOST
from rbee.stream import Answer, TaskOptions
from rbee.stream import TaskStream as AsyncTaskStream
from rbee.web.transport import connect_blocking, pause_blocking
from rbee.wire import messages as wire
from rbee.wire.messages import Event, Token

if TYPE_CHECKING:
    from rbee.cluster import ClusterOptions

T = TypeVar("T")
Narrate = Callable[[wire.Narration], object]


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    coroutine.close()
    raise RuntimeError("a coroutine over a blocking transport has suspended")


class TaskStream:
    """Iterate a job's events as they come; ends after ``end``.

    Leaving it before its end (the block, or the loop when nobody holds the stream any more)
    cancels the job. Errors are those of `AsyncClient.stream`.
    """

    def __init__(self, stream: AsyncTaskStream) -> None:
        self._stream = stream

    @property
    def job_id(self) -> str:
        """The job's id; "" until it has started."""
        return self._stream.job_id

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream has ended well; `PeerError` before."""
        return self._stream.answer

    def __enter__(self) -> TaskStream:
        finish(self._stream.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            return finish(self._stream.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def text(self) -> Iterator[str]:
        """Iterate the pieces of text only."""
        return (event.t for event in self if isinstance(event, Token))

    def close(self) -> None:
        """Let go of the job, which cancels it if it has not ended; safe to call again."""
        self._stream.close()


class JobEvents(TaskStream):
    """Iterate a job's events as they come; ends after ``end``. Leaving does nothing to the job.

    A connection that was cut is made again for some seconds. Errors are those of
    `rbee.job.JobEvents`.
    """

    _stream: AsyncJobEvents

    @property
    def last_seen(self) -> int:
        """The number of the last event that was given out."""
        return self._stream.last_seen


class Job:
    """A job of `Client.enqueue`; errors are those of `AsyncJob`."""

    def __init__(self, job: AsyncJob) -> None:
        self._job = job
        self.id = job.id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def events(self, last_seen: int = 0) -> JobEvents:
        """Return the job's events, those after a number; ask as often as you like."""
        return JobEvents(self._job.events(last_seen))

    def result(self) -> Answer:
        """Wait for the whole answer; Ctrl+C leaves the job as it is."""
        return finish(self._job.result())

    def status(self) -> wire.TaskInfo:
        """Ask how it stands."""
        return finish(self._job.status())

    def cancel(self) -> None:
        """End it; one that has ended is fine."""
        finish(self._job.cancel())


class Client:
    """Talk to a running queen; calls block until they are answered.

    Arguments and errors are those of `AsyncClient`. No call but connecting has a time limit. It
    holds no connection: there is nothing to close, and threads may share it.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        home: Path | str | None = None,
    ) -> None:
        self._client = AsyncClient(
            url, token, home=home, connect=connect_blocking, pause=pause_blocking
        )
        self.url = self._client.url
        self.token = self._client.token

    @classmethod
    @contextmanager
    def ephemeral(cls, **options: Unpack[ClusterOptions]) -> Iterator[Client]:
        """Own a cluster while the body runs; ``options`` are those of `rbee.Cluster`."""
        from rbee.threaded import Cluster

        with Cluster(**options) as cluster:
            yield cluster.client

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Every call closes its own connection: nothing is left to do."""

    # jobs ------------------------------------------------------------------------------------
    def stream(
        self,
        model: str | wire.TaskRequest,
        prompt: str | None = None,
        *,
        messages: Iterable[Said] | None = None,
        **options: Unpack[TaskOptions],
    ) -> TaskStream:
        """Return a job's stream of events; leaving it before its end cancels the job."""
        return TaskStream(self._client.stream(model, prompt, messages=messages, **options))

    def infer(
        self,
        model: str | wire.TaskRequest,
        prompt: str | None = None,
        *,
        messages: Iterable[Said] | None = None,
        **options: Unpack[TaskOptions],
    ) -> Answer:
        """Return the whole answer to a prompt; Ctrl+C cancels the job."""
        return finish(self._client.infer(model, prompt, messages=messages, **options))

    def chat(self, model: str, messages: Iterable[Said], **options: Unpack[TaskOptions]) -> Answer:
        """Return the next answer of a conversation; Ctrl+C cancels the job."""
        return finish(self._client.chat(model, messages, **options))

    def enqueue(
        self,
        model: str | wire.TaskRequest,
        prompt: str | None = None,
        *,
        messages: Iterable[Said] | None = None,
        **options: Unpack[TaskOptions],
    ) -> Job:
        """Have a prompt answered whether or not anybody waits; see `AsyncClient.enqueue`."""
        return Job(finish(self._client.enqueue(model, prompt, messages=messages, **options)))

    def job(self, job_id: str) -> Job:
        """Return a job of that id, whoever enqueued it."""
        return Job(self._client.job(job_id))

    def jobs(self) -> list[wire.TaskInfo]:
        """List the jobs that the queen knows, the oldest first."""
        return finish(self._client.jobs())

    def job_status(self, job_id: str) -> wire.TaskInfo:
        """Ask how a job stands; raise `GoneError` or `NotFoundError` if it is not known."""
        return finish(self._client.job_status(job_id))

    def cancel_job(self, job_id: str) -> None:
        """End a job; one that has ended, or never was, is fine."""
        finish(self._client.cancel_job(job_id))

    def job_events(self, job_id: str, last_seen: int = 0) -> JobEvents:
        """Return the events of a job, those after a number."""
        return JobEvents(self._client.job_events(job_id, last_seen))

    # what there is ---------------------------------------------------------------------------
    def health(self) -> wire.Health:
        """Ask who it is; from then on a broken stream is told as what it means."""
        return finish(self._client.health())

    def workers(self) -> list[wire.WorkerInfo]:
        """List the workers that the queen has asked for."""
        return finish(self._client.workers())

    def hives(self) -> list[wire.HiveInfo]:
        """List the hives that run, and those that have ended with something left."""
        return finish(self._client.hives())

    def nodes(self) -> list[wire.NodeInfo]:
        """List this cluster's machines; ``localhost``, the queen's own, is the first."""
        return finish(self._client.nodes())

    def node(self, name: str) -> wire.NodeInfo:
        """Describe one node; raise `NotFoundError` if there is none of that name."""
        return finish(self._client.node(name))

    def models(self) -> list[wire.ModelInfo]:
        """List the models on the disks of all nodes."""
        return finish(self._client.models())

    # what is to be there ---------------------------------------------------------------------
    def start_worker(
        self, start: wire.StartWorker, narrate: Narrate | None = None, *, wait: bool = True
    ) -> wire.WorkerInfo:
        """Have a worker started; ``narrate`` gets what happens until it is ready.

        Args:
            wait: False returns once it is on its way, and tells nothing of that.

        Raises:
            RbeeError: it did not become ready, and why.
        """
        return finish(self._client.start_worker(start, _narrate(narrate), wait=wait))

    def explain_start(self, start: wire.StartWorker) -> list[wire.NodeChoice]:
        """Ask where a worker would be started, the best node first, and why."""
        return finish(self._client.explain_start(start))

    def stop_worker(self, worker_id: str) -> None:
        """Stop a worker; nothing of it is left when this returns."""
        finish(self._client.stop_worker(worker_id))

    def start_hive(self, node: str = LOCALHOST, narrate: Narrate | None = None) -> wire.HiveInfo:
        """Have a hive run on a node; one that does already is fine."""
        return finish(self._client.start_hive(node, _narrate(narrate)))

    def stop_hive(self, node: str = LOCALHOST) -> None:
        """End a node's hive and its workers; nothing of them is left when this returns."""
        finish(self._client.stop_hive(node))

    def add_node(self, node: wire.AddNode) -> wire.NodeInfo:
        """Have the queen try a node and register it."""
        return finish(self._client.add_node(node))

    def update_node(self, name: str, update: wire.UpdateNode) -> wire.NodeInfo:
        """Change what ``update`` gives of a node's entry."""
        return finish(self._client.update_node(name, update))

    def remove_node(self, name: str) -> None:
        """Forget a node; raise `NotFoundError` if there is none of that name."""
        finish(self._client.remove_node(name))

    def pull(self, request: wire.PullModel, narrate: Narrate | None = None) -> wire.Pulled:
        """Have a model on a node's disk; Ctrl+C ends it."""
        return finish(self._client.pull(request, _narrate(narrate)))

    def remove_model(self, name: str, *, node: str = LOCALHOST) -> None:
        """Remove a model, by its record's name, from a node's disk unless a worker uses it."""
        finish(self._client.remove_model(name, node=node))

    def shutdown(self) -> None:
        """Order the queen to end; it has acknowledged, not ended, when this returns."""
        finish(self._client.shutdown())


def _narrate(narrate: Narrate | None) -> NarrateAsync | None:
    if narrate is None:
        return None

    async def tell(narration: wire.Narration) -> None:
        narrate(narration)

    return tell
