"""Heads are read as h11 reads them, or refused, as all is that could be read in two ways."""

from __future__ import annotations

from typing import Any

import h11
import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rbee.errors import BadInputError, PeerError, RbeeError
from rbee.web.head import (
    MAX_HEAD,
    HeadTooLargeError,
    encode_answer,
    encode_request,
    end_to_end,
    find_head,
    parse_answer,
    parse_request,
)

LINE = b"POST /v1/x?a=1 HTTP/1.1\r\n"
HOST = b"Host: h\r\n"
OK = b"HTTP/1.1 200 OK\r\n"


def test_a_request_is_taken_apart() -> None:
    data = LINE + HOST + b"X-A:  b c \t\r\nContent-Length: 3\r\n\r\n"
    head = parse_request(data)
    assert (head.method, head.target, head.path) == ("POST", b"/v1/x?a=1", "/v1/x")
    assert head.headers == ((b"host", b"h"), (b"x-a", b"b c"), (b"content-length", b"3"))
    assert (head.length, head.version, head.keeps_alive, head.upgrades) == (3, "1.1", True, False)
    assert find_head(data + b"abc") == len(data)


@pytest.mark.parametrize(
    ("line", "length"),
    [(b"", 0), (b"Transfer-Encoding: CHUNKED\r\n", None), (b"Content-Length: 007\r\n", 7)],
)
def test_a_body_is_as_long_as_the_head_says(line: bytes, length: int | None) -> None:
    assert parse_request(LINE + HOST + line + b"\r\n").length == length


@pytest.mark.parametrize(
    ("line", "keeps", "upgrades"),
    [
        (b"Connection: close\r\n", False, False),
        (b"Connection: x, Close\r\n", False, False),
        (b"Connection: upgrade\r\nUpgrade: websocket\r\n", True, True),
        (b"Upgrade: websocket\r\n", True, False),
    ],
)
def test_what_a_client_wants_of_its_connection(line: bytes, keeps: bool, upgrades: bool) -> None:
    head = parse_request(b"GET /x HTTP/1.1\r\n" + HOST + line + b"\r\n")
    assert (head.keeps_alive, head.upgrades) == (keeps, upgrades)


HOSTILE = {
    "both lengths": b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
    "both lengths, the other way": b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
    "two lengths": b"Content-Length: 3\r\nContent-Length: 4\r\n",
    "the same length twice": b"Content-Length: 3\r\nContent-Length: 3\r\n",
    "a list of lengths": b"Content-Length: 3, 3\r\n",
    "a signed length": b"Content-Length: +3\r\n",
    "a negative length": b"Content-Length: -3\r\n",
    "a hexadecimal length": b"Content-Length: 0x3\r\n",
    "no length": b"Content-Length: \r\n",
    "a length beyond 64 bits": b"Content-Length: 99999999999999999999\r\n",
    "compressed chunks": b"Transfer-Encoding: gzip, chunked\r\n",
    "chunked not last": b"Transfer-Encoding: chunked, identity\r\n",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    "almost chunked": b"Transfer-Encoding: xchunked\r\n",
    "identity": b"Transfer-Encoding: identity\r\n",
    "two hosts": HOST,
    "a folded line": b"A: b\r\n c: d\r\n",
    "a folded line with a tab": b"A: b\r\n\tc\r\n",
    "a space before the colon": b"Content-Length : 3\r\n",
    "a bare LF": b"A: b\nC: d\r\n",
    "a bare CR": b"A: b\rC: d\r\n",
    "a NUL": b"A: b\0\r\n",
    "a control character": b"A: b\x01\r\n",
    "no name": b": b\r\n",
    "no colon": b"Ab\r\n",
    "a name that is none": b"A(: b\r\n",
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_head_that_can_be_read_in_two_ways_is_refused(line: bytes) -> None:
    with pytest.raises(BadInputError) as info:
        parse_request(LINE + HOST + line + b"\r\n")
    assert info.value.http_status == 400
    if line != HOST:
        with pytest.raises(PeerError):
            parse_answer(OK + line + b"\r\n")


@pytest.mark.parametrize(
    "line",
    [b"POST  /x HTTP/1.1", b"POST /x  HTTP/1.1", b" POST /x HTTP/1.1", b"POST /x y HTTP/1.1",
     b"POST /x", b"POST /x HTTP/0.9", b"POST /x HTTP/2.0", b"POST /x HTTP/1.2", b"FOO /x HTTP/1.1",
     b"post /x HTTP/1.1", b"POST /\xff HTTP/1.1", b"POST /\0 HTTP/1.1", b"\x16\x03\x01\x02\0"],
)  # fmt: skip
def test_a_line_that_is_no_request_is_refused(line: bytes) -> None:
    with pytest.raises(BadInputError):
        parse_request(line + b"\r\n" + HOST + b"\r\n")


def test_an_endless_head_is_refused_with_431() -> None:
    assert find_head(LINE + b"A: " + b"b" * (MAX_HEAD - len(LINE) - 4)) == 0
    with pytest.raises(HeadTooLargeError) as info:
        find_head(LINE + b"A: " + b"b" * (MAX_HEAD - len(LINE) - 3))
    assert info.value.http_status == 431


def test_lines_that_end_in_lf_alone_are_not_waited_for() -> None:
    with pytest.raises(BadInputError, match="CR LF"):
        find_head(b"GET /x HTTP/1.1\nHost: h\n\n")
    assert find_head(b"GET /x HTTP/1.1\r") == 0


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (OK + b"Content-Length: 3\r\n\r\n", (200, 3, False, True)),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", (200, None, True, True)),
        (OK + b"\r\n", (200, None, False, False)),
        (OK + b"Content-Length: 3\r\nConnection: close\r\n\r\n", (200, 3, False, False)),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n", (200, 3, False, False)),
        (b"HTTP/1.1 204 No Content\r\n\r\n", (204, 0, False, True)),
        (b"HTTP/1.1 100 Continue\r\n\r\n", (100, 0, False, True)),
        (b"HTTP/1.1 503 \r\nContent-Length: 0\r\n\r\n", (503, 0, False, True)),
    ],
)
def test_an_answer_is_taken_apart(head: bytes, expected: tuple[Any, ...]) -> None:
    found = parse_answer(head)
    assert (found.status, found.length, found.chunked, found.keeps_alive) == expected


@pytest.mark.parametrize("line", [b"HTTP/1.1 20 OK\r\n", b"HTTP/1.1 2000 OK\r\n", b"SSH-2.0-x\r\n"])
def test_what_is_no_answer_is_refused(line: bytes) -> None:
    with pytest.raises(PeerError):
        parse_answer(line + b"\r\n")


def test_headers_of_one_connection_are_not_passed_on() -> None:
    headers = (
        (b"connection", b"close, X-Hop"), (b"x-hop", b"1"), (b"keep-alive", b"5"), (b"te", b"a"),
        (b"transfer-encoding", b"chunked"), (b"x-request-id", b"r"), (b"cookie", b"c"),
    )  # fmt: skip
    assert end_to_end(headers, without=frozenset({b"cookie"})) == ((b"x-request-id", b"r"),)


@pytest.mark.parametrize("size", [1, 2, 10, 999_999_999_999_999])
def test_a_head_that_is_known_but_for_the_length_of_its_body_has_its_own(size: int) -> None:
    told = (b"content-length", b"%d" % size)
    for _ in range(2):
        request = parse_request(LINE + HOST + b"Content-Length: %d\r\nX: 1\r\n\r\n" % size)
        assert (request.length, request.headers[1]) == (size, told)
        answer = parse_answer(OK + b"content-length: %d\r\nX: 1\r\n\r\n" % size)
        assert (answer.length, answer.headers[0]) == (size, told)
        nothing = parse_answer(b"HTTP/1.1 304 Not Modified\r\nContent-Length: %d\r\n\r\n" % size)
        assert (nothing.length, nothing.headers[0]) == (0, told)


def test_a_second_length_is_refused_though_the_head_is_known() -> None:
    for length in (1, 7):
        head = LINE + HOST + b"content-length: %d\r\n" % length
        assert parse_request(head + b"\r\n").length == length
        with pytest.raises(BadInputError, match="Content-Length"):
            parse_request(head + b"content-length: 1\r\n\r\n")


def test_a_head_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = LINE + HOST + b"X-Once: 1\r\nContent-Length: "
    parse_request(begin + b"5\r\n\r\n")
    monkeypatch.setattr(httptools, "HttpRequestParser", None)
    assert parse_request(begin + b"17\r\n\r\n").length == 17


# against h11 ----------------------------------------------------------------------------------
TOKEN = st.text("abcXYZ019!#$%&'*+-.^_`|~", min_size=1, max_size=12).map(str.encode)
VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, blacklist_characters="\x7f"))
HEADERS = st.lists(
    st.tuples(TOKEN, VALUE.map(lambda text: text.encode("latin-1").strip(b" \t"))), max_size=6
)
PIECES = st.sampled_from(
    [b"GET", b"POST", b" ", b"/", b"/x", b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\n", b"\r", b":",
     b"Host: h\r\n", b"Host: h", b"Content-Length: ", b"Content-Length", b"Transfer-Encoding: ",
     b"chunked", b"gzip", b",", b"3", b"-", b"+", b"0", b"\t", b"\0", b"a", b"Connection: close",
     b"\xff", b"HTTP/1.1 200 OK\r\n"]
)  # fmt: skip
NEAR = st.lists(PIECES, max_size=12).map(b"".join)


def own(name: bytes) -> bool:
    return name.lower() not in (
        b"host", b"connection", b"upgrade", b"content-length", b"transfer-encoding",
    )  # fmt: skip


@given(HEADERS)
def test_any_head_that_h11_reads_is_read_the_same(headers: list[tuple[bytes, bytes]]) -> None:
    sent = [(b"Host", b"h"), *(pair for pair in headers if own(pair[0]))]
    data = encode_request("POST", b"/x", sent)
    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(data)
    event = oracle.next_event()
    assert isinstance(event, h11.Request)
    assert list(parse_request(data).headers) == list(event.headers)


@given(HEADERS)
def test_any_head_that_is_sent_is_read_back(headers: list[tuple[bytes, bytes]]) -> None:
    sent = [(name.lower(), value) for name, value in headers if own(name)]
    data = encode_answer(200, [*sent, (b"content-length", b"0")])
    assert list(parse_answer(data).headers[:-1]) == sent


@given(NEAR)
@example(b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n")
def test_what_is_taken_means_the_same_to_h11(lines: bytes) -> None:
    """Of what h11 refuses nothing is taken, and of the rest the body is as long."""
    data = b"POST /x HTTP/1.1\r\nHost: h\r\n" + lines + b"\r\n\r\n"
    data = data[: data.find(b"\r\n\r\n") + 4]
    try:
        head = parse_request(data)
    except RbeeError:
        return
    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(data)
    event = oracle.next_event()
    assert isinstance(event, h11.Request)
    assert list(head.headers) == list(event.headers)
    if head.length:
        oracle.receive_data(b"x" * head.length)
        assert isinstance(body := oracle.next_event(), h11.Data)
        assert len(body.data) == head.length
    elif head.length is None:
        oracle.receive_data(b"1\r\nx\r\n")
        assert isinstance(oracle.next_event(), h11.Data)
    else:
        assert isinstance(oracle.next_event(), h11.EndOfMessage)
