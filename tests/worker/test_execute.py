"""One execution against a fake engine, in simulated time."""

import json
from contextlib import asynccontextmanager

import pytest
import trio

from rbee.errors import BadInputError, CancelledError
from rbee.model import WorkerId, WorkerSpec
from rbee.wire import sse
from rbee.wire.messages import ExecuteRequest
from rbee.worker.engine import Chunk
from rbee.worker.execute import LONGEST_PAUSE, STALL, Execution, pause_after_send
from rbee.worker.jobs import Jobs
from rbee.worker.metrics import Figures


class FakeEngine:
    """Plays steps: lists of chunks are yielded, numbers slept, exceptions raised."""

    context, app = 100, None

    def __init__(self, *steps, refuse=None):
        self.steps = steps
        self.refuse = refuse
        self.left = False

    @asynccontextmanager
    async def generate(self, request):
        if self.refuse:
            raise self.refuse
        try:
            yield FakeGeneration(iter(self.steps))
        finally:
            self.left = True


class FakeGeneration:
    tokens_in = 3

    def __init__(self, steps):
        self.steps = steps

    def __aiter__(self):
        return self

    async def __anext__(self):
        for step in self.steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, list):
                return step
            await trio.sleep(step)
        raise StopAsyncIteration


async def run(engine, jobs=None, *, lag=0.0):
    """Run one execution to its end; return events, sends and figures."""
    decoder, events, sends = sse.Decoder(), [], []

    async def emit(chunk):
        await trio.sleep(lag)
        sends.append(chunk)
        events.extend((name, json.loads(data)) for name, data in decoder.feed(chunk))

    figures, jobs = Figures(), Jobs() if jobs is None else jobs
    spec = WorkerSpec(WorkerId("w"), "m")
    await Execution(engine, ExecuteRequest("j", "x"), spec, jobs, figures).run(emit)
    return events, sends, figures


LAST = [Chunk("b", 2, "stop")]


async def test_tokens_are_counted_by_token_and_one_step_is_one_send(autojump_clock):
    engine = FakeEngine([Chunk("a", 1), Chunk("", 1)], 1, LAST)
    events, sends, figures = await run(engine)
    assert [name for name, _ in events] == ["started", "token", "token", "end"]
    assert [data["i"] for name, data in events if name == "token"] == [1, 4]
    assert events[-1][1]["tokens_out"] == figures.tokens_out == 4
    assert len(sends) == 3
    assert figures.jobs == {"done": 1}


async def test_no_token_for_the_limit_is_a_stall_and_leaves_the_engine(autojump_clock):
    engine = FakeEngine([Chunk("a", 1)], STALL + 1, LAST)
    start = trio.current_time()
    events, _, figures = await run(engine)
    assert trio.current_time() - start == STALL
    assert [name for name, _ in events] == ["started", "token", "error"]
    assert events[-1][1]["code"] == "stalled"
    assert engine.left
    assert figures.jobs == {"failed": 1}


def test_only_many_streams_wait_between_sends_and_never_long():
    assert pause_after_send(1) == pause_after_send(4) == 0
    assert 0 < pause_after_send(8) < pause_after_send(16) < LONGEST_PAUSE
    assert pause_after_send(1000) == LONGEST_PAUSE


async def test_a_reader_that_lags_is_no_stall(autojump_clock):
    events, _, _ = await run(FakeEngine([Chunk("a", 1)], LAST), lag=STALL / 2)
    assert events[-1][0] == "end"


@pytest.mark.parametrize(
    ("steps", "code"),
    [((ValueError("bug"),), "internal"), ((), "engine"), ((BadInputError("x"),), "bad_input")],
)
async def test_whatever_goes_wrong_there_is_one_terminal_event(steps, code, error_records):
    events, _, _ = await run(FakeEngine([Chunk("a", 1)], *steps))
    assert [name for name, _ in events] == ["started", "token", "error"]
    assert events[-1][1]["code"] == code
    error_records.clear()


async def test_a_refusal_before_the_start_is_raised():
    with pytest.raises(BadInputError):
        await run(FakeEngine(refuse=BadInputError("no")))


async def test_a_cancelled_job_tells_its_reason(autojump_clock):
    jobs = Jobs()

    async def cancel():
        await trio.sleep(1)
        assert jobs.end("j", CancelledError("deleted"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel)
        events, _, figures = await run(FakeEngine(5, LAST), jobs)
    assert events[-1] == (
        "error",
        {"code": "cancelled", "message": "deleted", "hint": "", "details": {}},
    )
    assert figures.jobs == {"cancelled": 1}
    assert len(jobs) == 0
