"""Where the time of a request goes."""

from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.log import OneLine
from rbee.trace import Elsewhere, Trace, Tracing, current, running_id


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("rbee.trace.time.monotonic", lambda: now[0])
    return now


def test_what_others_take_is_not_overhead(clock: list[float]) -> None:
    trace = Trace("r", began=clock[0])
    with Tracing(trace):
        clock[0] += 0.001  # ours
        with Elsewhere():
            clock[0] += 1  # the client sends his body
        current().want_worker()
        clock[0] += 2  # none is free
        trace.come_to_worker("m")
        with Elsewhere():
            clock[0] += 4  # it dies
        trace.want_worker()
        clock[0] += 8  # another one is started
        trace.come_to_worker("m")
        clock[0] += 0.002  # ours
        assert trace.note_head() == pytest.approx(0.003)
        clock[0] += 16  # the stream
    assert trace.queued == pytest.approx(10)
    assert trace.overhead == pytest.approx(0.003)


async def test_tasks_of_a_request_know_it_until_it_is_over() -> None:
    ids: list[str] = []

    async def look(twice: trio.Event) -> None:
        ids.append(running_id())
        await twice.wait()
        ids.append(running_id())

    over = trio.Event()
    async with trio.open_nursery() as nursery:
        with Tracing(Trace("mine")):
            nursery.start_soon(look, over)
            await wait_all_tasks_blocked()
        over.set()
    assert ids == ["mine", ""]
    assert running_id() == ""


def test_a_line_of_the_log_ends_with_the_id_unless_it_has_it() -> None:
    line = OneLine("%(message)s")
    record = logging.LogRecord("x", logging.INFO, "", 0, "told", (), None)
    named = logging.LogRecord("x", logging.INFO, "", 0, "refused [mine]: no", (), None)
    with Tracing(Trace("mine")):
        assert line.format(record) == "told [mine]"
        assert line.format(named) == "refused [mine]: no"
    assert line.format(record) == "told"
