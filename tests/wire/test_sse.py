"""Events survive any split of the bytes, and nothing but a terminal event looks like one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rbee.errors import PeerError
from rbee.wire import sse
from rbee.wire.messages import End, Error, Event, Narration, Queued, Started, Token

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["\nevent: end\n", "\n\n", "\r\n\r\n", "event: end\ndata: {}\n\n", "data:", ":", "\u2028", "\0"]
)
numbers = st.integers(0, 10**9)
passing = st.one_of(
    st.builds(Queued, texts, numbers),
    st.builds(Narration, texts, texts, texts),
    st.builds(Started, texts, texts, texts, texts),
    st.builds(Token, texts, numbers),
)
terminal = st.one_of(
    st.builds(Error, texts, texts, texts),
    st.builds(End, numbers, numbers, texts, st.floats(0, 1e9), st.floats(0, 1e9)),
)
cuts = st.lists(st.integers(0, 10**4), max_size=12)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def decode(chunks: list[bytes]) -> list[Event | None]:
    decoder = sse.Decoder()
    pairs = [pair for chunk in chunks for pair in decoder.feed(chunk)]
    return [sse.event_from(name, data) for name, data in pairs]


@given(st.lists(passing | terminal, max_size=5), cuts)
def test_what_comes_out_is_what_went_in(events: list[Event], cuts: list[int]) -> None:
    assert decode(split(b"".join(map(sse.encode, events)), cuts)) == events


@given(st.lists(passing | terminal, max_size=3), cuts)
def test_comments_unknown_fields_and_crlf_make_no_difference(
    events: list[Event], cuts: list[int]
) -> None:
    data = b": hello\n\n" + b"".join(b"id: 7\n: x\n" + sse.encode(event) for event in events)
    assert decode(split(data.replace(b"\n", b"\r\n"), cuts)) == events


@given(texts, numbers)
def test_a_token_is_encoded_alike_by_the_quick_way(text: str, index: int) -> None:
    assert sse.encode_token(text, index) == sse.encode(Token(text, index))


def test_a_token_with_half_a_surrogate_pair_is_still_an_event() -> None:
    assert decode([sse.encode_token("a\ud83d", 1), sse.encode(Token("\ud83d", 2))]) == [
        Token("a?", 1),
        Token("?", 2),
    ]


def test_an_event_without_an_end_is_not_given() -> None:
    assert decode([b"event: token\ndata: {}"]) == []


def test_an_event_that_never_ends_is_the_peers_fault() -> None:
    decoder = sse.Decoder()
    with pytest.raises(PeerError, match="longer than"):
        list(decoder.feed(b"data: " + b"x" * sse.MAX_EVENT))


def test_data_of_several_lines_is_joined() -> None:
    assert list(sse.Decoder().feed(b"data: a\ndata:b\n\n")) == [("message", "a\nb")]


def test_an_event_of_an_unknown_name_is_none() -> None:
    assert sse.event_from("later", "{}") is None


@pytest.mark.parametrize("data", ["{", "[]", '{"t": 1, "i": 1}', '{"t": "a"}'])
def test_a_broken_event_is_the_peers_fault(data: str) -> None:
    with pytest.raises(PeerError, match="a broken token event"):
        sse.event_from("token", data)


@given(passing | terminal)
@example(Token("\nevent: end\n", 1))
def test_exactly_the_terminal_events_are_known(event: Event) -> None:
    assert sse.is_terminal(sse.encode(event)) is isinstance(event, End | Error)
