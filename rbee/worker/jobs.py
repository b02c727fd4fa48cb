"""The requests in progress: each has a scope that can be cancelled, and a reason for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import trio

from rbee.errors import BadInputError, ConflictError, RbeeError

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@attrs.define(eq=False)
class Job:
    """One request. ``error`` is set by whoever cancels it, before the scope is."""

    id: str
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    error: RbeeError | None = None

    def end(self, error: RbeeError) -> None:
        """Cancel it for this reason; the first reason stays."""
        if self.error is None:
            self.error = error
        self.scope.cancel(reason=error.code)


class Jobs:
    """All requests in progress, by id."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._empty = trio.Event()
        self._empty.set()
        self._empty_since = trio.current_time()
        self.had_any = False

    def __len__(self) -> int:
        return len(self._jobs)

    @contextmanager
    def open(self, job_id: str) -> Iterator[Job]:
        """Register a job for the length of the body.

        Raises:
            ConflictError: a job with this id is in progress.
        """
        if not _ID.fullmatch(job_id):
            raise BadInputError(f"job_id {job_id[:40]!r} is not valid: letters, digits and ._:-")
        if job_id in self._jobs:
            raise ConflictError(f"job {job_id} is in progress already", code="job_exists")
        if not self._jobs:
            self._empty = trio.Event()
            self.had_any = True
        job = self._jobs[job_id] = Job(job_id)
        try:
            yield job
        finally:
            del self._jobs[job_id]
            if not self._jobs:
                self._empty.set()
                self._empty_since = trio.current_time()

    def idle(self) -> float:
        """Return the seconds without a job; 0 while there is one."""
        return 0.0 if self._jobs else trio.current_time() - self._empty_since

    def end(self, job_id: str, error: RbeeError) -> bool:
        """End one job; False if there is none of this id."""
        if job := self._jobs.get(job_id):
            job.end(error)
        return job is not None

    def end_all(self, error: RbeeError) -> None:
        for job in self._jobs.values():
            job.end(error)

    async def wait_empty(self) -> None:
        await self._empty.wait()
