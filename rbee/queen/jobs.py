"""Jobs: from a request to its one terminal event, whatever happens on the way."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from functools import partial

import trio

from rbee.errors import (
    BadInputError,
    DeadlineError,
    RbeeError,
    leaves,
)
from rbee.model import JobId, new_id
from rbee.queen.aliases import Aliases
from rbee.queen.asking import STALL, ask_at, open_answer
from rbee.queen.assignments import Assignments
from rbee.queen.delivery import Connected, Delivery, Kept
from rbee.queen.hive import Hive
from rbee.queen.job import Job
from rbee.queen.keys import Key
from rbee.queen.limits import LONGEST_NAME
from rbee.queen.shelf import KEPT, Shelf
from rbee.queen.tries import ask_until_answered
from rbee.queen.waiting_room import Terms
from rbee.scopes import TaskOwner
from rbee.trace import REQUEST_ID, current
from rbee.web.door import Headers
from rbee.web.out import Out, read_all
from rbee.web.upstream import Upstreams
from rbee.wire import codec, messages, sse
from rbee.wire.messages import ExecuteRequest, Queued, TaskRequest, WorkerInfo
from rbee.wire.refusal import error_of

log = logging.getLogger(__name__)

PRIORITIES = 1 << 63  # vLLM takes what fits into 64 bits
HEADERS: Headers = ((b"content-type", b"application/json"), (b"accept", sse.CONTENT_TYPE))


class Jobs(TaskOwner):
    """All jobs of one queen; they end when the body of `open` does.

    One that is attached runs in the task of the connection that it belongs to, one that is kept in
    a task of its own.
    """

    def __init__(
        self,
        assignments: Assignments,
        aliases: Aliases,
        upstreams: Upstreams,
        ending: Callable[[], RbeeError],
    ) -> None:
        self._assignments = assignments
        self._aliases = aliases
        self._upstreams = upstreams
        self._ending = ending
        self._running: dict[JobId, Job] = {}
        self.shelf = Shelf()

    def __len__(self) -> int:
        """Return how many have not ended."""
        return len(self._running)

    def __iter__(self) -> Iterator[Job]:
        """Iterate all that are known, the oldest first."""
        known = {job.id: job for job in (*self.shelf, *self._running.values())}
        return iter(sorted(known.values(), key=lambda job: job.created))

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        async with super().open():
            try:
                yield
            finally:
                for job in self._running.values():
                    job.cancel(self._ending())

    def get(self, job_id: str) -> Job:
        """Return a job; raise `GoneError` or `NotFoundError` if it is not, or never was, there."""
        return self._running.get(JobId(job_id)) or self.shelf.get(job_id)

    def cancel(self, job_id: str, why: RbeeError) -> None:
        """End a job; one that has ended, or never was, is fine."""
        if (job := self._running.get(JobId(job_id))) is not None:
            job.cancel(why)

    def accept(
        self, request: TaskRequest, session: str = "", key: Key | None = None, *, size: int = 0
    ) -> Job:
        """Make the job of a request of ``size`` bytes, which `attach` or `keep` is to run.

        Raises:
            BadInputError: its deadline has passed before it begins, its priority is out of range,
                its model's name is too long, or config.toml is wrong.
            ForbiddenError: the key is not for this model, or not for how its worker is started.
            RbeeError: the queen is stopping.
        """
        if request.deadline is not None and request.deadline <= 0:
            raise BadInputError(f"deadline must be greater than 0 seconds: {request.deadline:g}")
        if not -PRIORITIES <= request.priority < PRIORITIES:
            raise BadInputError(f"priority must fit into 64 bits: {request.priority}")
        if len(request.model) > LONGEST_NAME:
            raise BadInputError("the name of the model is too long", param="model")
        if key is not None:
            key.check_start(request)
            key.check_model(request.model, self._aliases.meanings)
        if not self.takes_tasks:
            raise self._ending()
        job_id = JobId(new_id("job"))
        while job_id in self._running or job_id in self.shelf:
            job_id = JobId(new_id("job"))
        return Job(job_id, self._aliases.fill(request), session=session, size=size, key=key)

    async def attach(self, job: Job, out: Out) -> None:
        """Run a job for a client who reads; cancelling, as when he leaves, ends it.

        Raises:
            RbeeError: it is refused before anything is sent.
        """
        delivery = Connected(out, job.id)
        try:
            with self._in_progress(job):
                error = await self._run(job, delivery)
            if error is not None:
                current().error = error.code
            current().is_told = True
            await delivery.end(error)
        finally:
            if not job.ended:
                log.info("job %s: its reader went away", job.id)

    async def keep(self, job: Job, size: int) -> None:
        """Begin a job that belongs to nobody.

        Args:
            size: bytes of its request.

        Raises:
            RbeeError: it is refused.
        """
        if not self.takes_tasks:
            raise self._ending()
        job.log = self.shelf.new_log()
        self.shelf.put(job, size)
        delivery = Kept(job.log, partial(job.note_end, None))
        self.tasks.start_soon(self._keep, job, delivery)
        await delivery.accepted.wait()
        if delivery.refusal is not None:
            raise delivery.refusal

    async def _keep(self, job: Job, delivery: Kept) -> None:
        """Run a job; what goes wrong in one ends that one only."""
        error: RbeeError | None = self._ending()
        try:
            with self._in_progress(job):
                error = await self._run(job, delivery)
        except RbeeError as exc:
            error = exc
        except Exception:
            log.exception("job %s failed by a bug", job.id)
            error = RbeeError("internal error, see the queen's log")
        finally:
            error = None if delivery.is_over else error
            job.note_end(error)
            delivery.end(error)
            self.shelf.note_end(job)
        if delivery.refusal is None:
            self.tasks.start_soon(self._forget_later, job.id)
        else:
            self.shelf.forget(job.id)

    async def _forget_later(self, job_id: JobId) -> None:
        """Keep a job for a while; it is the shelf's alone, which may have no room for so long."""
        await trio.sleep(KEPT)
        self.shelf.forget(job_id)

    @contextmanager
    def _in_progress(self, job: Job) -> Iterator[None]:
        if not self.takes_tasks:
            raise self._ending()
        self._running[job.id] = job
        try:
            # One that is kept goes on when the request that began it, which counts too, has ended.
            with job.key.holding() if job.key and job.log is not None else nullcontext():
                yield
        finally:
            del self._running[job.id]
            if job.log is None:
                self.shelf.remember(job.id)

    async def _run(self, job: Job, delivery: Delivery) -> RbeeError | None:
        """Bring a job to its end; return the error that it is to end with, None if it has."""
        error: RbeeError | None = None
        try:
            with job.scope:
                await self._run_in_time(job, delivery)
            error = job.why_cancelled
        except* RbeeError as group:
            error = next(leaf for leaf in leaves(group) if isinstance(leaf, RbeeError))
        if delivery.is_over:  # whatever came after its terminal event
            error = None
        if error is not None:
            log.info("job %s: %s: %s", job.id, error.code, error)
        job.note_end(error)
        return error

    async def _run_in_time(self, job: Job, delivery: Delivery) -> None:
        delivery.tell(Queued(job.id, 0))
        limit = job.request.deadline
        with trio.move_on_after(float("inf") if limit is None else limit) as scope:
            async with delivery.telling():
                await self._place_and_relay(job, delivery)
        if scope.cancelled_caught:
            raise DeadlineError(f"the job did not end within its deadline of {limit:g} s")

    async def _place_and_relay(self, job: Job, delivery: Delivery) -> None:
        relay = partial(self._relay, job, delivery)
        await ask_until_answered(
            self._assignments, job.request, delivery.tell, relay, lambda: delivery.has_passed,
            Terms(
                job.request.priority, job.session, partial(_tell_position, job, delivery),
                size=job.size,
            ),
        )  # fmt: skip

    # relaying --------------------------------------------------------------------------------
    async def _relay(self, job: Job, delivery: Delivery, worker: WorkerInfo) -> None:
        ask = partial(self._relay_from, worker, job, delivery)
        await ask_at(self._assignments, worker, ask, lambda: delivery.has_passed)

    async def _relay_from(
        self, worker: WorkerInfo, job: Job, delivery: Delivery, hive: Hive
    ) -> None:
        """Pass the worker's events through, byte for byte."""
        headers = (*HEADERS, (REQUEST_ID, current().id.encode()))
        asking = open_answer(
            self._upstreams, hive, worker, messages.EXECUTE, headers, codec.dumps(_execute(job)),
            STALL,
        )  # fmt: skip
        async with asking as answer:
            if answer.head.status != 200:
                raise error_of(answer.head.status, await read_all(answer))
            job.note_worker(worker)
            pace = self._assignments.figures.pace(answer, skip=1)
            try:
                await delivery.pass_on(answer)
            finally:
                self._assignments.figures.take_end(pace)


def _tell_position(job: Job, delivery: Delivery, position: int) -> None:
    job.position = position
    delivery.tell(Queued(job.id, position))


def _execute(job: Job) -> ExecuteRequest:
    r = job.request
    return ExecuteRequest(
        job_id=job.id, prompt=r.prompt, messages=r.messages, raw=r.raw, max_tokens=r.max_tokens,
        temperature=r.temperature, top_p=r.top_p, top_k=r.top_k, min_p=r.min_p,
        repetition_penalty=r.repetition_penalty, stop=r.stop, seed=r.seed, keep_alive=r.keep_alive,
        priority=r.priority,
    )  # fmt: skip
