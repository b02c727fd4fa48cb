"""The queen's routes about jobs: attached to a connection, or kept for who comes for them."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from rbee.errors import BadInputError, CancelledError, ConflictError, GoneError, NotFoundError
from rbee.queen.delivery import last_event
from rbee.queen.event_log import EventLog
from rbee.queen.job import Job
from rbee.queen.jobs import Jobs
from rbee.queen.keys import key_of
from rbee.queen.sessions import session_of
from rbee.queen.shelf import unknown_job
from rbee.web.router import App, Emit, Passing, Request, Response, Stream, json_response
from rbee.wire import codec, messages
from rbee.wire.messages import TaskAccepted, TaskRequest

ASYNC = b"respond-async"


def add_task_routes(app: App, jobs: Jobs) -> None:
    async def start(request: Request) -> Passing | Response:
        body = await request.json()
        asked, key = codec.loads(body, TaskRequest), key_of(request.caller)
        job = jobs.accept(asked, session_of(request), key, size=len(body))
        if not prefers_async(request):
            return Passing(partial(jobs.attach, job))
        await jobs.keep(job, len(body))
        return accepted(job)

    async def all_jobs(request: Request) -> Response:
        return json_response([job.info() for job in jobs if job.is_of(request.caller)])

    def own(request: Request) -> Job:
        job = jobs.get(request.params["job"])
        if not job.is_of(request.caller):
            raise unknown_job(job.id)
        return job

    async def one(request: Request) -> Response:
        return json_response(own(request).info())

    async def cancel(request: Request) -> Response:
        with suppress(NotFoundError, GoneError):  # one that has ended, or never was, is fine
            job = own(request)
            jobs.cancel(job.id, CancelledError(f"job {job.id} was cancelled"))
        return Response(status=204)

    async def events(request: Request) -> Stream | Response:
        job = own(request)
        if job.log is None:
            raise ConflictError(
                f"job {job.id} belongs to the connection that asked for it, and so do its events",
                code="attached",
            )
        seen = last_seen(request)
        if job.log.is_over and seen == job.log.last:
            return Response(status=204)  # which tells a browser not to come again
        job.log.after(seen)
        return Stream(partial(read_log, job.log, seen), (job_id_header(job),))

    add = partial(app.add, for_keys=True)
    add("POST", messages.TASKS, start, is_data=True)
    add("GET", messages.TASKS, all_jobs)
    add("GET", messages.TASKS + "/{job}", one)
    add("DELETE", messages.TASKS + "/{job}", cancel)
    add("GET", messages.TASKS + "/{job}/events", events, is_data=True)


def prefers_async(request: Request) -> bool:
    """Tell whether the answer may come later (RFC 7240)."""
    wishes = request.headers.get(b"prefer", b"").lower().split(b",")
    return ASYNC in (wish.partition(b";")[0].strip() for wish in wishes)


def accepted(job: Job) -> Response:
    place = f"{messages.TASKS}/{job.id}"
    headers = (
        (b"location", place.encode()),
        (b"preference-applied", ASYNC),
        job_id_header(job),
    )
    body = codec.dumps(TaskAccepted(job.id, f"{place}/events"))
    return Response(body, 202, headers=headers)


def job_id_header(job: Job) -> tuple[bytes, bytes]:
    return messages.JOB_ID_HEADER.encode(), job.id.encode()


def last_seen(request: Request) -> int:
    """Return the number of the last event that the reader has; 0 if he has none."""
    text = request.headers.get(b"last-event-id", b"").strip() or b"0"
    if not text.isdigit() or len(text) > 15:
        raise BadInputError("Last-Event-ID must be the number that an event came with")
    return int(text)


async def read_log(log: EventLog, seen: int, emit: Emit) -> None:
    """Send what a log has and gets, to its end, at the pace of the reader.

    If what he wants next is dropped before he takes it, his last event says so.
    """
    await emit(b"")
    while True:
        await log.wait(seen)
        try:
            data, seen = log.after(seen)
        except GoneError as error:
            await emit(last_event(error))
            return
        if not data:
            return
        await emit(data)
