"""Jobs: from a request to its one terminal event, whatever happens on the way."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import TypeVar

import attrs
import trio

from rbee.errors import (
    BadInputError,
    CancelledError,
    ChildExitedError,
    ConflictError,
    DeadlineError,
    NotFoundError,
    PeerError,
    QueueFullError,
    RbeeError,
    UnauthorizedError,
    UnavailableError,
    from_wire,
    leaves,
)
from rbee.hints import logs_of
from rbee.model import LOCALHOST, JobId, WorkerId, WorkerState, new_id
from rbee.models.reference import shown
from rbee.queen.aliases import Aliases
from rbee.queen.attempts import Narrate
from rbee.queen.backoff import Backoff
from rbee.queen.hive import Hive
from rbee.queen.hives import Hives
from rbee.queen.placement import choose, start_for
from rbee.queen.places import Places
from rbee.queen.turns import Turns
from rbee.queen.where import located
from rbee.remains import LEFT
from rbee.scopes import TaskOwner
from rbee.web.client import EventStream, answering_within, open_client, open_events
from rbee.wire import messages, sse
from rbee.wire.messages import (
    Error,
    ExecuteRequest,
    Narration,
    Queued,
    StartWorker,
    TaskRequest,
    WorkerInfo,
    WorkerNarration,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

BUFFER = 64  # chunks between a worker and a slow reader; beyond, the worker's socket waits
LOG_LINES = 12
WAITING = 64  # jobs that may wait for workers of one model
TRIES = 3  # workers that may be gone when a job comes to them: unloaded, or dead without a word
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
    worker_id: str = ""
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

    def narrate(self, narration: Narration) -> None:
        """Tell the reader what is going on; lost if he does not keep up."""
        try:
            self._send.send_nowait(sse.encode(narration))
        except (trio.WouldBlock, trio.BrokenResourceError):
            log.debug("job %s: narration lost", self.id)

    def finish(self, error: RbeeError) -> None:
        """Make ``error`` the terminal event, unless one went by already."""
        if not self.watch.seen and not self.last:
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
        self, hives: Hives, places: Places, aliases: Aliases, ending: Callable[[], RbeeError]
    ) -> None:
        self._hives = hives
        self._places = places
        self._turns = Turns()
        self._aliases = aliases
        self._ending = ending
        self._jobs: dict[JobId, Job] = {}
        self._waiting: Counter[str] = Counter()
        self._backoff = Backoff()

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
        tries = 1
        while not await self._relayed(job, await self._place(job), is_last=tries == TRIES):
            tries += 1

    async def _relayed(self, job: Job, worker: WorkerInfo, *, is_last: bool) -> bool:
        """Relay the answer; False if the worker went before it could say so: place once more."""
        try:
            await self._relay(job, worker)
        except (UnavailableError, ConflictError, UnauthorizedError, PeerError) as exc:
            # Another may have its port by now, and refuse our token or the job. A forward over SSH
            # takes the connection and hangs up; of a worker itself that is its death, by this job.
            is_death = isinstance(exc, PeerError) and not self._is_forwarded(worker)
            if is_last or job.watch.seen or job.streaming or is_death:
                raise
            log.info("job %s: worker %s is not there: %s", job.id, worker.worker_id, exc)
            self._hives.workers.remove(WorkerId(worker.worker_id))
            return False
        return True

    def _is_forwarded(self, worker: WorkerInfo) -> bool:
        hive = self._hives.running(worker.node)
        return hive is not None and hive.way_to(worker.url) != worker.url

    # placing ---------------------------------------------------------------------------------
    async def _place(self, job: Job) -> WorkerInfo:
        """Return a ready worker for the job, started if there is none."""
        ready = self._choose(job.request)
        if ready is not None and ready.state == WorkerState.READY.value:
            return ready
        with self._waiting_for(job.request.model):
            return await self._wait_for_worker(job)

    @contextmanager
    def _waiting_for(self, model: str) -> Iterator[None]:
        if self._waiting[model] >= WAITING:
            raise QueueFullError(
                f"{WAITING} requests wait for {shown(model)} to be loaded; no more can",
                hint="rbee-keeper worker list",
            )
        self._waiting[model] += 1
        try:
            yield
        finally:
            self._waiting[model] -= 1
            self._waiting += Counter()  # drops what is at 0

    async def _wait_for_worker(self, job: Job) -> WorkerInfo:
        start = self._aliases.spell_out(start_for(job.request, self._hives.queen_id))
        with self._hives.narrations.subscribe() as narrations:
            worker = await self._have_worker(job, start)
            try:
                ready = await self.until_ready(worker.worker_id, narrations, job.narrate)
            except RbeeError as exc:
                self._backoff.note_failure(start, worker.worker_id, exc)
                raise
            self._backoff.note_success(start)
            return ready

    async def _have_worker(self, job: Job, start: StartWorker) -> WorkerInfo:
        """Return a worker that is on its way at least."""
        names = {(start.node, name) for name in self._aliases.meanings(start.model)}
        asked = trio.current_time()
        async with self._turns.take(names):  # two jobs for one model are one start
            return self._choose(job.request) or await self._start(job, start, asked)

    def _choose(self, request: TaskRequest) -> WorkerInfo | None:
        running = Counter(job.worker_id for job in self._jobs.values())
        return choose(self._hives.workers, request, self._aliases.meanings, running)

    async def _start(self, job: Job, start: StartWorker, asked: float) -> WorkerInfo:
        self._backoff.check(start)

        async def begin(hive: Hive) -> WorkerInfo:
            async with hive.starting:  # the node may have been asked for by name as well
                there = attrs.evolve(job.request, node=hive.info.node)
                return self._choose(there) or await self._start_on(hive, start, job.narrate)

        return await self._places.start(start, job.narrate, begin, since=asked)

    async def _start_on(self, hive: Hive, start: StartWorker, narrate: Narrate) -> WorkerInfo:
        where = "" if hive.info.node == LOCALHOST else f" on {hive.info.node}"
        narrate(Narration("queen", "start", f"a worker for {shown(start.model)}{where}"))
        worker = await hive.start_worker(start)
        self._hives.note_started(worker)
        return worker

    async def until_ready(
        self,
        worker_id: str,
        narrations: trio.MemoryReceiveChannel[WorkerNarration],
        narrate: Narrate,
    ) -> WorkerInfo:
        """Wait for a worker, telling how it goes on; raise why it did not become ready."""
        began = trio.current_time()

        def forward(item: WorkerNarration) -> None:
            if item.worker_id == worker_id:
                narrate(Narration(item.actor, item.action, item.text, item.share))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_for_each, narrations, forward)
            worker = await self._hives.workers.wait_until(lambda: self._settled(worker_id))
            nursery.cancel_scope.cancel(reason="worker settled")
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:  # what was told before it settled
                forward(narrations.receive_nowait())
        if worker.state != WorkerState.READY.value:
            raise located(_failure(worker), worker.node)
        narrate(Narration("queen", "ready", f"after {trio.current_time() - began:.1f} s"))
        return worker

    def _settled(self, worker_id: str) -> WorkerInfo | None:
        worker = self._hives.workers.get(WorkerId(worker_id))
        if worker is None:
            return self._hives.failures.get(worker_id)
        return worker if worker.state in (WorkerState.READY.value, *LEFT) else None

    # relaying --------------------------------------------------------------------------------
    async def _relay(self, job: Job, worker: WorkerInfo) -> None:
        """Pass the worker's events through, until its node is lost."""
        job.worker_id = worker.worker_id
        hive = self._hives.running(worker.node)
        if hive is None:
            raise UnavailableError(f"the hive on {worker.node} is gone", code="hive_lost")
        with hive.relaying() as scope:
            await self._relay_from(hive, worker, job)
        if scope.cancelled_caught:
            raise await self._broken(worker)

    async def _relay_from(self, hive: Hive, worker: WorkerInfo, job: Job) -> None:
        """Pass the worker's events through, byte for byte."""
        what = f"worker {worker.worker_id}"
        body = _execute(job)
        headers = {messages.WORKER_ID_HEADER: worker.worker_id}
        client = open_client(hive.way_to(worker.url), hive.token)
        async with client, AsyncExitStack() as stack:
            opened = open_events(client, "POST", messages.EXECUTE, body, what=what, headers=headers)
            with answering_within(STALL, what):
                events = await stack.enter_async_context(opened)
            job.streaming = True
            try:
                while chunk := await self._next_chunk(events, what):
                    await job.emit(chunk)
            except PeerError as exc:
                raise await self._broken(worker) from exc
        if not job.watch.seen:
            raise await self._broken(worker)

    async def _next_chunk(self, events: EventStream, what: str) -> bytes:
        """Wait for the worker only: a reader that lags is not a stall."""
        with answering_within(STALL, what):
            return await events.chunk()

    async def _broken(self, worker: WorkerInfo) -> RbeeError:
        """Make the error of an answer that broke off, with the worker's own end if it is told."""
        error: RbeeError = ChildExitedError(
            f"worker {worker.worker_id} on {worker.node} ended in the middle of the answer",
            code="worker_died",
            hint=logs_of(worker.worker_id, worker.node),
        )
        with trio.move_on_after(TOLD_WITHIN):
            ended = await self._hives.workers.wait_until(lambda: self._over(worker.worker_id))
            error.message += f": {_failure(ended).message}"
        return error

    def _over(self, worker_id: str) -> WorkerInfo | None:
        worker = self._hives.workers.get(WorkerId(worker_id))
        if worker is not None:
            return worker if worker.state in LEFT else None
        return self._hives.failures.get(worker_id)


async def _for_each(items: trio.MemoryReceiveChannel[T], take: Callable[[T], None]) -> None:
    async for item in items:
        take(item)


def _execute(job: Job) -> ExecuteRequest:
    r = job.request
    return ExecuteRequest(
        job_id=job.id, prompt=r.prompt, messages=r.messages, raw=r.raw, max_tokens=r.max_tokens,
        temperature=r.temperature, top_p=r.top_p, top_k=r.top_k, min_p=r.min_p,
        repetition_penalty=r.repetition_penalty, stop=r.stop, seed=r.seed, keep_alive=r.keep_alive,
    )  # fmt: skip


def _failure(worker: WorkerInfo) -> RbeeError:
    """Make the error of a worker that did not become ready, with the end of its log."""
    detail = worker.error
    if detail is None:
        return UnavailableError(f"worker {worker.worker_id} was stopped", code="worker_stopped")
    message = detail.message
    lines = str(detail.details.get("log", "")).splitlines()[-LOG_LINES:]
    if lines and detail.code != BadInputError.code:
        message += "\nthe end of its log:\n  " + "\n  ".join(lines)
    hint = detail.hint or logs_of(worker.worker_id, worker.node)
    return from_wire(detail.code, message, hint=hint, details=detail.details)
