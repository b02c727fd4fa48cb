"""Whole events only, and every byte of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rbee.web.events import WholeEvents
from rbee.wire.sse import MAX_EVENT

PIECES = st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b"\r", b"data: x\n\n", b""]), max_size=20)


@given(PIECES)
def test_what_is_let_through_ends_with_an_event_and_nothing_is_lost(pieces: list[bytes]) -> None:
    events, sent = WholeEvents(), b""
    for piece in pieces:
        data = events.feed(piece)
        assert not data or data.endswith((b"\n\n", b"\n\r\n"))
        sent += data
    rest = events.rest()
    assert sent + rest == b"".join(pieces)
    assert b"\n\n" not in rest
    assert b"\n\r\n" not in rest
    assert events.torn == bool(rest)


def test_an_event_that_is_too_long_to_hold_passes_torn() -> None:
    events = WholeEvents()
    assert events.feed(b"data: a\n\ndata: " + b"x" * MAX_EVENT) == b"data: a\n\n"
    assert not events.torn
    assert len(events.feed(b"y")) == MAX_EVENT + 7
    assert events.torn
    assert events.feed(b"z\n\n") == b"z\n\n"
    assert not events.torn


def test_the_end_of_an_openai_stream_is_known() -> None:
    events = WholeEvents()
    for data, done in [
        (b'data: {"a": "data: [DONE]"}\n\n', False),
        (b"data: [DO", False),
        (b"NE]\n\n", True),
        (b"data: more", True),
    ]:
        events.feed(data)
        assert events.is_done == done
    events.rest()
    assert not events.is_done


def test_a_stream_may_have_to_end_with_a_certain_event() -> None:
    events = WholeEvents(lambda event: event.startswith(b"end"), must_end=True)
    assert (events.lacks_end, events.has_any) == (True, False)
    for data, lacks in [
        (b"en", True),
        (b"d\r\n\r\n", False),
        (b"a\n\nend: b\n\n", False),
        (b"end\n\na: end\n\n", True),
    ]:
        events.feed(data)
        assert events.lacks_end == lacks
    assert events.has_any
    assert not WholeEvents().lacks_end
