"""What is kept of jobs that belong to nobody: enough to come back to, and no more than that."""

from __future__ import annotations

from collections.abc import Iterator

from rbee.errors import GoneError, NotFoundError, QueueFullError
from rbee.model import JobId
from rbee.queen.event_log import EventLog
from rbee.queen.job import Job

KEPT = 60.0  # seconds after a job's end
LIMIT = 64 << 20  # bytes of all jobs: the requests of those that go on, and the events
RECORD = 4 << 10  # bytes that each takes beside both
REMEMBERED = 4096  # ids of which nothing else is known


class Shelf:
    """The jobs of one queen that are kept, and the names of those that were.

    When they take too much, those that ended first go; then the older half of the longest log.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._jobs: dict[JobId, Job] = {}
        self._ended: dict[JobId, None] = {}  # in that order
        self._costs: dict[JobId, int] = {}
        self._going = 0  # bytes of those that have not ended, less their events
        self._gone: dict[JobId, None] = {}
        self._size = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    @property
    def size(self) -> int:
        """Bytes that all of it takes."""
        return self._size

    def new_log(self) -> EventLog:
        """Make a log that counts."""
        return EventLog(self._note)

    def put(self, job: Job, size: int) -> None:
        """Keep a job whose request has ``size`` bytes.

        Raises:
            QueueFullError: those that go on take all there is.
        """
        cost = size + RECORD
        if self._going + cost > self._limit:
            raise QueueFullError(
                f"the jobs that have not ended take {self._limit >> 20} MiB; no more can",
                hint="curl -X DELETE …/v2/tasks/JOB_ID",
            )
        self._jobs[job.id] = job
        self._costs[job.id] = cost
        self._going += cost
        self._note(cost)

    def note_end(self, job: Job) -> None:
        """Keep no more of a job than its events, and not even those if there is no room."""
        self._ended[job.id] = None
        cost, self._costs[job.id] = self._costs[job.id], RECORD
        self._going -= cost
        self._note(RECORD - cost)

    def forget(self, job_id: JobId) -> None:
        """Keep no more of a job than its name, for a while; twice does no harm."""
        job = self._jobs.pop(job_id, None)
        self.remember(job_id)
        if job is not None and job.log is not None:
            self._ended.pop(job_id, None)
            self._size -= self._costs.pop(job_id) + job.log.size

    def remember(self, job_id: JobId) -> None:
        """Know that there was a job of that name."""
        self._gone[job_id] = None
        if len(self._gone) > REMEMBERED:
            del self._gone[next(iter(self._gone))]

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            GoneError: it is not kept any more.
            NotFoundError: there is none of that name.
        """
        name = JobId(job_id)
        if name in self._jobs:
            return self._jobs[name]
        if name in self._gone:
            raise GoneError(f"job {job_id} has ended and is not kept any more", code="job_gone")
        raise unknown_job(job_id)

    def __contains__(self, job_id: JobId) -> bool:
        return job_id in self._jobs or job_id in self._gone

    def _note(self, size: int) -> None:
        self._size += size
        while self._size > self._limit and self._make_room():
            pass

    def _make_room(self) -> bool:
        if self._ended:
            self.forget(next(iter(self._ended)))
            return True
        longest = max((job.log for job in self if job.log), key=lambda log: log.size, default=None)
        if longest is None or longest.first == longest.last:
            return False
        longest.shrink()
        return True


def unknown_job(job_id: str) -> NotFoundError:
    return NotFoundError(f"no job {job_id!r}", code="unknown_job")
