"""One job: what was asked for, how far it is, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import attrs
import trio

from rbee.errors import RbeeError
from rbee.model import JobId, JobState
from rbee.queen.event_log import EventLog
from rbee.queen.keys import Key
from rbee.web.door import Caller
from rbee.wire import sse
from rbee.wire.messages import (
    End,
    ErrorDetail,
    Event,
    TaskInfo,
    TaskRequest,
    Token,
    WorkerInfo,
)

LOOKED_AT = 2  # events, from the end: a token may be followed by an error


@attrs.define(eq=False)
class Job:
    """One request.

    Attributes:
        log: its events, if it belongs to nobody; else they are on the connection that it is of.
        session: what belongs to the same goes to the same worker while that has room.
        size: bytes of the request's body.
        key: whose job it is; None with the queen's token.
        position: how many are before it.
        created, started, ended: seconds since the epoch; 0 is not yet.
    """

    id: JobId
    request: TaskRequest
    log: EventLog | None = None
    session: str = ""
    size: int = 0
    key: Key | None = None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    worker: WorkerInfo | None = None
    position: int = 0
    created: float = attrs.field(factory=time.time)
    started: float = 0.0
    ended: float = 0.0
    error: RbeeError | None = None
    _why: RbeeError | None = None

    @property
    def state(self) -> JobState:
        if not self.ended:
            return JobState.STARTED if self.started else JobState.QUEUED
        if self.error is None:
            return JobState.ENDED
        return JobState.CANCELLED if self.error.code == "cancelled" else JobState.FAILED

    @property
    def why_cancelled(self) -> RbeeError | None:
        """The error of a job that was cancelled, if that has happened."""
        return self._why if self.scope.cancelled_caught else None

    def is_of(self, caller: Caller | None) -> bool:
        """Tell whether it is a caller's to see and to end; with the token all are."""
        return caller is None or (self.key is not None and self.key.name == caller.name)

    def cancel(self, why: RbeeError) -> None:
        """End it for this reason; the first reason stays."""
        self._why = self._why or why
        self.scope.cancel(reason=why.code)

    def note_worker(self, worker: WorkerInfo) -> None:
        """Note that a worker is at it."""
        self.worker = worker
        self.position = 0
        self.started = time.time()

    def note_end(self, error: RbeeError | None) -> None:
        """Note how it ended; the first end stays."""
        if self.ended:
            return
        self.ended = time.time()
        self.error = error
        # What was asked may be long, and nobody needs it any more.
        asked = self.request
        self.request = TaskRequest(asked.model, priority=asked.priority, deadline=asked.deadline)

    def info(self) -> TaskInfo:
        """Return what the queen tells about it."""
        worker, error, r = self.worker, self.error, self.request
        info = TaskInfo(
            self.id, self.state.value, r.model, attached=self.log is None, priority=r.priority,
            deadline=r.deadline, worker_id=worker.worker_id if worker else "",
            node=worker.node if worker else "", position=self.position, created=self.created,
            started=self.started, ended=self.ended,
        )  # fmt: skip
        if error is not None:
            detail = ErrorDetail(error.code, error.message, error.hint, error.details)
            info = attrs.evolve(info, error=detail)
        return info if self.log is None else _with_events(info, self.log)


def _with_events(info: TaskInfo, log: EventLog) -> TaskInfo:
    """Add what the events say; looked at only when somebody asks."""
    info = attrs.evolve(info, first_event=log.first if log.last else 0, last_event=log.last)
    for told in islice(_newest(log), LOOKED_AT):
        if isinstance(told, Token):
            return attrs.evolve(info, tokens_out=told.i)
        if isinstance(told, End):
            return attrs.evolve(
                info, tokens_in=told.tokens_in, tokens_out=told.tokens_out,
                stop_reason=told.stop_reason,
            )  # fmt: skip
    return info


def _newest(log: EventLog) -> Iterator[Event | None]:
    for event in log.newest():
        for pair in sse.Decoder().feed(event):
            yield sse.event_from(*pair)
