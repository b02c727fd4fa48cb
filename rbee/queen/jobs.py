"""Jobs: from a request to its one terminal event, whatever happens on the way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import TypeVar

import attrs
import trio

from rbee.errors import (
    BadInputError,
    CancelledError,
    DeadlineError,
    NotFoundError,
    PeerError,
    RbeeError,
    leaves,
)
from rbee.model import JobId, new_id
from rbee.queen.aliases import Aliases
from rbee.queen.assignments import Assignments
from rbee.queen.hive import Hive
from rbee.queen.tries import ask_until_answered
from rbee.scopes import TaskOwner
from rbee.trace import current, elsewhere
from rbee.web.client import EventStream, answering_within, open_client, open_events
from rbee.wire import messages, sse
from rbee.wire.messages import (
    Error,
    ExecuteRequest,
    Narration,
    Queued,
    TaskRequest,
    WorkerInfo,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

BUFFER = 64  # chunks between a worker and a slow reader; beyond, the worker's socket waits
LOG_LINES = 12
WAITING = 64  # jobs that may wait for workers of one model
STALL = 65.0  # seconds of silence; a worker itself gives up after 60 without a token
TOLD_WITHIN = 1.0  # seconds for the news of a worker's end


@attrs.define(eq=False)
class Job:
    """One request; its reader iterates ``chunks`` and then sends ``last``, if there is one."""

    id: JobId
    request: TaskRequest
    _send: trio.MemorySendChannel[bytes]
    chunks: trio.MemoryReceiveChannel[bytes]
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    watch: sse.TerminalWatch = attrs.field(factory=sse.TerminalWatch)
    last: bytes = b""
    streaming: bool = False
    _rest: bytes = b""

    async def emit(self, chunk: bytes) -> None:
        """Pass on whole events only: half of one, of a worker that died, would swallow ``last``."""
        data = self._rest + chunk
        end = data.rfind(b"\n\n") + 2
        self._rest = data[end:] if end > 1 else data
        if len(self._rest) > sse.MAX_EVENT:
            raise PeerError(f"an event longer than {sse.MAX_EVENT} bytes")
        if end > 1:
            await self._send.send(data[:end])
            self.watch.feed(data[:end])  # now that the reader will get it
            current().is_told = self.watch.seen

    def narrate(self, narration: Narration) -> None:
        """Tell the reader what is going on; lost if he does not keep up."""
        try:
            self._send.send_nowait(sse.encode(narration))
        except (trio.WouldBlock, trio.BrokenResourceError):
            log.debug("job %s: narration lost", self.id)

    def finish(self, error: RbeeError) -> None:
        """Make ``error`` the terminal event, unless one went by already."""
        if not self.watch.seen and not self.last:
            current().error = error.code
            log.info("job %s: %s: %s", self.id, error.code, error)
            self.last = sse.encode(Error(error.code, error.message, error.hint, error.details))

    def close(self) -> None:
        self._send.close()

    def cancel(self, why: str) -> None:
        self.scope.cancel(reason=why)


def open_job(request: TaskRequest) -> Job:
    send, receive = trio.open_memory_channel[bytes](BUFFER)
    return Job(JobId(new_id("job")), request, send, receive)


class Jobs(TaskOwner):
    """All jobs of one queen; their tasks live in the nursery that `open` holds."""

    def __init__(
        self, assignments: Assignments, aliases: Aliases, ending: Callable[[], RbeeError]
    ) -> None:
        self._assignments = assignments
        self._aliases = aliases
        self._ending = ending
        self._jobs: dict[JobId, Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def get(self, job_id: str) -> Job:
        job = self._jobs.get(JobId(job_id))
        if job is None:
            raise NotFoundError(f"no job {job_id!r}", code="unknown_job")
        return job

    def start(self, request: TaskRequest) -> Job:
        """Accept a request; the job belongs to whoever reads it.

        Raises:
            BadInputError: its deadline has passed before it begins, or config.toml is wrong.
            RbeeError: the queen is stopping.
        """
        if request.deadline is not None and request.deadline <= 0:
            raise BadInputError(f"deadline must be greater than 0 seconds: {request.deadline:g}")
        if not self.takes_tasks:
            raise self._ending()
        job = open_job(self._aliases.fill(request))
        self._jobs[job.id] = job
        self.tasks.start_soon(self._keep, job)
        return job

    async def _keep(self, job: Job) -> None:
        """Bring a job to its end; what goes wrong in one job ends that job only."""
        try:
            with job.scope:
                await self._run(job)
            if job.scope.cancelled_caught:
                job.finish(CancelledError("the job was cancelled"))
        except* RbeeError as group:
            error = next(leaves(group))
            assert isinstance(error, RbeeError)
            job.finish(error)
        except* trio.BrokenResourceError:
            log.info("job %s: its reader went away", job.id)
        finally:
            job.finish(self._ending())
            job.close()
            del self._jobs[job.id]

    async def _run(self, job: Job) -> None:
        await job.emit(sse.encode(Queued(job.id, 0)))
        limit = job.request.deadline
        with trio.move_on_after(float("inf") if limit is None else limit) as scope:
            await self._place_and_relay(job)
        if scope.cancelled_caught:
            raise DeadlineError(f"the job did not end within its deadline of {limit:g} s")

    async def _place_and_relay(self, job: Job) -> None:
        relay = partial(self._relay, job)
        await ask_until_answered(
            self._assignments, job.request, job.narrate, relay, lambda: job.streaming
        )

    # relaying --------------------------------------------------------------------------------
    async def _relay(self, job: Job, worker: WorkerInfo) -> None:
        """Pass the worker's events through, until its node is lost."""
        with self._assignments.at(worker) as (hive, scope):
            await self._relay_from(hive, worker, job)
        if scope.cancelled_caught:
            raise await self._assignments.lost(worker, has_begun=job.streaming)

    async def _relay_from(self, hive: Hive, worker: WorkerInfo, job: Job) -> None:
        """Pass the worker's events through, byte for byte."""
        what = f"worker {worker.worker_id}"
        body = _execute(job)
        headers = {messages.WORKER_ID_HEADER: worker.worker_id}
        client = open_client(hive.way_to(worker.url), hive.token)
        async with client, AsyncExitStack() as stack:
            opened = open_events(client, "POST", messages.EXECUTE, body, what=what, headers=headers)
            with answering_within(STALL, what), elsewhere():
                events = await stack.enter_async_context(opened)
            pace = self._assignments.figures.pace_of_stream(skip=1)
            try:
                while chunk := await self._next_chunk(events, what):
                    job.streaming = True
                    pace.piece(chunk, time.monotonic())
                    await job.emit(chunk)
            except PeerError as exc:
                if not job.streaming:
                    raise
                raise await self._assignments.broken(worker) from exc
            finally:
                self._assignments.figures.take_end(pace)
        if not job.streaming:
            raise PeerError(f"{what} ended before its answer")
        if not job.watch.seen:
            raise await self._assignments.broken(worker)

    async def _next_chunk(self, events: EventStream, what: str) -> bytes:
        """Wait for the worker only: a reader that lags is not a stall."""
        with answering_within(STALL, what):
            return await events.chunk()


def _execute(job: Job) -> ExecuteRequest:
    r = job.request
    return ExecuteRequest(
        job_id=job.id, prompt=r.prompt, messages=r.messages, raw=r.raw, max_tokens=r.max_tokens,
        temperature=r.temperature, top_p=r.top_p, top_k=r.top_k, min_p=r.min_p,
        repetition_penalty=r.repetition_penalty, stop=r.stop, seed=r.seed, keep_alive=r.keep_alive,
    )  # fmt: skip
