"""A job's events, kept: whoever comes back gets exactly the rest, or is told that it has gone."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from rbee.errors import BadInputError, GoneError
from rbee.queen.event_log import PIECE, EventLog
from rbee.wire import sse

EVENTS = st.lists(st.text(max_size=30) | st.just("\nevent: end\n\n"), max_size=40)


def token(text: str, number: int = 1) -> bytes:
    return sse.encode_token(text, number)


def numbered(events: list[bytes], first: int = 1) -> bytes:
    return b"".join(b"id: %d\n%b" % pair for pair in enumerate(events, first))


def rest_of(log: EventLog, seen: int) -> bytes:
    parts = []
    while log.last > seen:
        part, seen = log.after(seen)
        assert part
        parts.append(part)
    assert log.after(seen) == (b"", seen)
    return b"".join(parts)


@settings(max_examples=50, deadline=None)
@given(EVENTS, st.integers(60, 600), st.lists(st.integers(1, 5), max_size=20), st.data())
def test_whoever_resumes_gets_exactly_the_rest_or_is_told_that_it_has_gone(
    texts: list[str], limit: int, batches: list[int], data: st.DataObject
) -> None:
    grown: list[int] = []
    log = EventLog(grown.append, limit=limit)
    events = [token(text, number) for number, text in enumerate(texts)]
    left = list(events)
    for batch in [*batches, len(events)]:
        log.extend(b"".join(left[:batch]))
        del left[:batch]
        assert log.size <= limit or log.first == log.last
        if data.draw(st.booleans()):
            log.shrink()
    assert log.size == sum(grown)
    assert log.last == len(events)
    for seen in range(len(events) + 1):
        if seen < log.first - 1:
            with pytest.raises(GoneError) as gone:
                log.after(seen)
            assert gone.value.details == {"first": log.first}
        else:
            assert rest_of(log, seen) == numbered(events[seen:], seen + 1)
    with pytest.raises(BadInputError, match="no event"):
        log.after(len(events) + 1)


def test_a_reader_gets_a_piece_at_a_time_and_whole_events_only() -> None:
    log = EventLog()
    event = token("x" * 1000)
    log.extend(event * 200)
    part, seen = log.after(0)
    assert len(part) <= PIECE
    assert part == numbered([event] * seen)
    log.extend(token("y" * PIECE))
    assert log.after(200) == (numbered([token("y" * PIECE)], 201), 201)


async def test_readers_wait_for_more_and_for_the_end() -> None:
    log, got = EventLog(), []

    async def read(seen: int) -> None:
        await log.wait(seen)
        got.append(log.after(seen)[1])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, 0)
        nursery.start_soon(read, 1)
        await wait_all_tasks_blocked()
        log.extend(token("a"))
        await wait_all_tasks_blocked()
        assert got == [1]
        log.end()
    assert got == [1, 1]
    await log.wait(1)


def test_a_million_tokens_take_no_more_than_the_limit() -> None:
    log = EventLog(limit=1 << 16)
    for _ in range(100):
        log.extend(token(" word") * 500)
    assert (1 << 15) < log.size <= 1 << 16
    assert log.last == 50_000
