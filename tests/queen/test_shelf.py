"""What is kept of jobs is bounded, whatever is asked for."""

from __future__ import annotations

import pytest

from rbee.errors import GoneError, NotFoundError, QueueFullError
from rbee.model import JobId
from rbee.queen.job import Job
from rbee.queen.shelf import RECORD, REMEMBERED, Shelf
from rbee.wire import sse
from rbee.wire.messages import TaskRequest

MIB = 1 << 20


def put(shelf: Shelf, name: str, events: int = 0, request: int = 0) -> Job:
    job = Job(JobId(name), TaskRequest("words"), shelf.new_log())
    shelf.put(job, request)
    add(job, events)
    return job


def add(job: Job, events: int) -> None:
    assert job.log is not None
    job.log.extend(sse.encode_token("x" * 1000, 1) * events)


def test_those_that_ended_first_go_when_there_is_no_room() -> None:
    shelf = Shelf(2 * MIB)
    names = ("one", "two", "three")
    jobs = {name: put(shelf, name, events=600) for name in names}
    for name in ("two", "one", "three"):
        shelf.note_end(jobs[name])
    assert shelf.size <= 2 * MIB
    put(shelf, "four", events=600)
    with pytest.raises(GoneError, match="job two has ended"):
        shelf.get("two")
    assert [job.id for job in shelf] == ["one", "three", "four"]
    with pytest.raises(NotFoundError):
        shelf.get("five")


def test_the_longest_log_is_shortened_when_all_jobs_go_on() -> None:
    shelf = Shelf(2 * MIB)
    short, long = put(shelf, "short", events=500), put(shelf, "long", events=900)
    for _ in range(10):
        add(long, 300)
        assert shelf.size <= 2 * MIB
    assert short.log is not None
    assert long.log is not None
    assert (short.log.first, long.log.last) == (1, 3900)
    assert long.log.first > 900


def test_no_more_is_taken_than_can_be_kept_until_it_has_ended() -> None:
    shelf = Shelf(2 * MIB)
    first = put(shelf, "first", request=MIB)
    for _ in range(2):
        with pytest.raises(QueueFullError, match="2 MiB"):
            put(shelf, "second", request=MIB)
    shelf.note_end(first)
    assert shelf.size == RECORD
    put(shelf, "third", request=MIB)
    shelf.forget(first.id)
    shelf.forget(first.id)
    assert shelf.size == RECORD + MIB


def test_names_are_remembered_for_a_while() -> None:
    shelf = Shelf()
    for number in range(REMEMBERED + 1):
        shelf.remember(JobId(f"job-{number}"))
    assert JobId("job-0") not in shelf
    assert JobId("job-1") in shelf
