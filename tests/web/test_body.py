"""Whatever pieces a body comes in, it is what it is, and ends where h11 says."""

from __future__ import annotations

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rbee.errors import BadInputError, PeerError
from rbee.web.body import (
    LAST_CHUNK,
    MAX_LINE,
    MAX_TRAILER,
    Body,
    Chunked,
    Counted,
    UntilClosed,
    body_of_answer,
    body_of_request,
    chunk,
)
from rbee.web.head import parse_answer


def fed(body: Body, data: bytes, cuts: list[int]) -> bytes:
    """Feed ``data`` in pieces of the given sizes, again and again, until it is all in."""
    got, at, sizes = b"", 0, [cut for cut in cuts if cut] or [len(data) or 1]
    while at < len(data):
        size = sizes[0]
        sizes = sizes[1:] + sizes[:1]
        got += body.feed(data[at : at + size])
        at += size
    return got


CUTS = st.lists(st.integers(1, 9), max_size=5)
PARTS = st.lists(st.binary(min_size=1, max_size=40), max_size=5)


@given(PARTS, CUTS, st.binary(max_size=5))
def test_a_chunked_body_is_read_whatever_the_cuts(
    parts: list[bytes], cuts: list[int], rest: bytes
) -> None:
    data = b"".join(map(chunk, parts)) + LAST_CHUNK + rest
    body = Chunked()
    assert fed(body, data, cuts) == b"".join(parts)
    assert (body.done, body.rest) == (True, rest)


@given(st.binary(max_size=40), CUTS, st.binary(max_size=5))
def test_a_counted_body_is_read_whatever_the_cuts(
    data: bytes, cuts: list[int], rest: bytes
) -> None:
    body = Counted(len(data))
    assert fed(body, data + rest, cuts) == data
    assert (body.done, body.rest) == (True, rest)


def test_a_body_without_an_end_takes_everything() -> None:
    body = UntilClosed()
    assert body.feed(b"0\r\n\r\n") == b"0\r\n\r\n"
    assert not body.done


def test_extensions_and_trailers_are_dropped() -> None:
    body = Chunked()
    assert body.feed(b'3;a="b"\r\nabc\r\n0;x\r\nA: b\r\nC: d\r\n\r\nrest') == b"abc"
    assert (body.done, body.rest) == (True, b"rest")


@pytest.mark.parametrize(
    "data",
    [b"x\r\n", b"\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\n", b" 1\r\n", b"1 \r\n", b"1\n", b"1_0\r\n",
     b"1" * 16 + b"\r\n", b"3\r\nabcd", b"3\r\nabc\n", b"3\r\nabc\rx", b"1;\0\r\n", b"1\r1\r\n",
     b"1;" + b"a" * MAX_LINE, b"0\r\n" + b"A: b\r\n" * MAX_TRAILER],
    ids=lambda data: repr(data[:12]),
)  # fmt: skip
def test_bad_chunks_are_refused(data: bytes) -> None:
    for cuts in ([], [1]):
        with pytest.raises(BadInputError):
            fed(Chunked(), data + b"1" * MAX_LINE, cuts)
    with pytest.raises(PeerError):
        fed(Chunked(PeerError), data + b"1" * MAX_LINE, [])


PIECES = st.sampled_from(
    [b"0", b"1", b"a", b"F", b"\r\n", b"\r", b"\n", b";", b" ", b"x", b"A: b\r\n", b"0\r\n\r\n"]
)


@given(st.lists(PIECES, max_size=12).map(b"".join), CUTS)
@example(b"1\r\nx\r\n0\r\n\r\n", [])
@example(b"0\r\n\n", [])
def test_what_is_taken_means_the_same_to_h11(data: bytes, cuts: list[int]) -> None:
    body = Chunked()
    try:
        got = fed(body, data, cuts)
    except BadInputError:
        return
    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n" + data)
    expected = b""
    try:
        while (event := oracle.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            expected += event.data if isinstance(event, h11.Data) else b""
            if isinstance(event, h11.EndOfMessage):
                break
    except h11.RemoteProtocolError:
        assert b"\r\n" in data.partition(b"0")[2]  # it checks the trailer, which we drop
        return
    assert got == expected
    assert body.done == isinstance(event, h11.EndOfMessage)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"Content-Length: 3\r\n", Counted),
        (b"Transfer-Encoding: chunked\r\n", Chunked),
        (b"", UntilClosed),
    ],
)
def test_an_answer_has_the_body_that_its_head_says(head: bytes, kind: type[Body]) -> None:
    found = parse_answer(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
    assert type(body_of_answer(found, PeerError)) is kind


def test_a_request_has_the_body_that_its_head_says() -> None:
    assert isinstance(body_of_request(None), Chunked)
    assert body_of_request(0).done
    assert not body_of_request(1).done
