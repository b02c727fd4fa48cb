"""Heads of HTTP/1.1 messages: parsed by httptools, and refused where a proxy could read otherwise.

What follows a head is a body whose end both sides must see at the same byte: so there is one way
to say its length, nothing is folded, and no line ends in anything but CRLF.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from http import HTTPStatus
from typing import TypeVar

import attrs
import httptools

from rbee.errors import BadInputError, PeerError, RbeeError

MAX_HEAD = 32 << 10
KNOWN, LONGEST_KNOWN = 256, 4 << 10  # heads that are not parsed again, and the bytes of such a one
END = b"\r\n\r\n"
Headers = tuple[tuple[bytes, bytes], ...]

_REQUEST_LINE = re.compile(rb"[A-Z-]+ [!-~]+ HTTP/1\.[01]\r\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] [1-9][0-9]{2}(?: [^\r\n]*)?\r\n")
_TOLD = re.compile(rb"\r\ncontent-length: ([1-9][0-9]{0,14})\r\n", re.IGNORECASE)
_NO_BODY = (204, 304)
_STATUS_LINES = {
    one.value: f"HTTP/1.1 {one.value} {one.phrase}\r\n".encode("ascii") for one in HTTPStatus
}
# Between two neighbours only (RFC 9110 7.6.1), with what a framing of our own replaces.
HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
     b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length"}
)  # fmt: skip


class HeadTooLargeError(BadInputError):
    code = "head_too_large"
    http_status = 431


class TooSlowError(BadInputError):
    """A request did not come in time."""

    code = "too_slow"
    http_status = 408


@attrs.frozen
class RequestHead:
    """The head of a request.

    Attributes:
        headers: in their order, the names in lower case.
        length: bytes of the body; None for a chunked one.
        version: ``1.1`` or ``1.0``.
        keeps_alive: whether the client would send another request on this connection.
        upgrades: whether it asks for another protocol, or is a CONNECT.
    """

    method: str
    target: bytes
    headers: Headers
    length: int | None
    version: str
    keeps_alive: bool
    upgrades: bool = False

    @property
    def path(self) -> str:
        """The target without its query, as it was sent."""
        return self.target.partition(b"?")[0].decode("ascii")

    def with_length(self, length: bytes) -> RequestHead:
        """Return the same head with another content-length, which it has."""
        return RequestHead(
            self.method, self.target, _with_length(self.headers, length), int(length),
            self.version, self.keeps_alive, self.upgrades,
        )  # fmt: skip


@attrs.frozen
class AnswerHead:
    """The head of an answer.

    Attributes:
        length: bytes of the body; None if it is chunked or ends with the connection.
        chunked: whether the body is chunked.
        keeps_alive: whether the connection can be used again after the body.
    """

    status: int
    headers: Headers
    length: int | None
    chunked: bool
    keeps_alive: bool

    def with_length(self, length: bytes) -> AnswerHead:
        """Return the same head with another content-length, which it has."""
        return AnswerHead(
            self.status, _with_length(self.headers, length), int(length) if self.length else 0,
            self.chunked, self.keeps_alive,
        )  # fmt: skip


class _Collector:
    """Takes what httptools finds."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self.complete = True


def find_head(data: bytes | bytearray) -> int:
    """Return where a head ends, 0 if it goes on. Empty lines before it are the caller's to drop.

    Raises:
        BadInputError: its lines do not end in CRLF.
        HeadTooLargeError: it is longer than `MAX_HEAD`.
    """
    end = data.find(END, 0, MAX_HEAD)
    if end >= 0:
        return end + len(END)
    if len(data) >= MAX_HEAD:
        raise HeadTooLargeError(f"the head of a request has at most {MAX_HEAD} bytes")
    if data.count(b"\n") != data.count(b"\r\n"):  # quick: this is looked at with every packet
        raise BadInputError("the lines of a head end in CR LF")
    return 0


Head = TypeVar("Head", RequestHead, AnswerHead)


def _parse_once(
    data: bytes, parse: Callable[[bytes], Head], parse_known: Callable[[bytes], Head]
) -> Head:
    """Parse a head unless one like it was: those of a peer differ in their content-length alone."""
    if len(data) > LONGEST_KNOWN:
        return parse(data)
    told = _TOLD.search(data)
    if told is None:
        return parse_known(data)
    return parse_known(data[: told.start(1)] + b"1" + data[told.end(1) :]).with_length(told[1])


def _with_length(headers: Headers, length: bytes) -> Headers:
    return tuple(
        [(name, length if name == b"content-length" else value) for name, value in headers]
    )


def parse_request(data: bytes) -> RequestHead:
    """Parse a whole head, empty line included.

    Raises:
        BadInputError: it is not one, or it says in two ways where the body ends.
    """
    return _parse_once(data, _parse_request, _parse_known_request)


def _parse_request(data: bytes) -> RequestHead:
    found = _Collector()
    parser = httptools.HttpRequestParser(found)
    upgrades = False
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        upgrades = True
    except httptools.HttpParserError as exc:
        raise BadInputError(f"this is no HTTP request: {exc}") from exc
    if not _REQUEST_LINE.match(data) or not found.complete:
        raise BadInputError("this is no HTTP/1.1 request")
    version = parser.get_http_version()
    hosts = sum(name == b"host" for name, _ in found.headers)
    if hosts > 1 or (version == "1.1" and not hosts):
        raise BadInputError(f"the header host came {hosts} times")
    length = _length(found.headers, BadInputError)
    return RequestHead(
        method=parser.get_method().decode("ascii"),
        target=found.url,
        headers=tuple(found.headers),
        length=0 if length == -1 else length,
        version=version,
        keeps_alive=parser.should_keep_alive() and not _says(found.headers, b"close"),
        upgrades=upgrades,
    )


def parse_answer(data: bytes) -> AnswerHead:
    """Parse a whole head, empty line included, of the answer to a request that was no HEAD.

    Raises:
        PeerError: it is not one, or it says in two ways where the body ends.
    """
    return _parse_once(data, _parse_answer, _parse_known_answer)


def _parse_answer(data: bytes) -> AnswerHead:
    found = _Collector()
    parser = httptools.HttpResponseParser(found)
    try:
        parser.feed_data(data)
    except httptools.HttpParserError as exc:
        raise PeerError(f"this is no HTTP answer: {exc}") from exc
    if not _STATUS_LINE.match(data) or not found.complete:
        raise PeerError("this is no HTTP answer")
    status = parser.get_status_code()
    length = _length(found.headers, PeerError)
    if status in _NO_BODY or status < 200:
        length = 0
    return AnswerHead(
        status=status,
        headers=tuple(found.headers),
        length=length if length != -1 else None,
        chunked=length is None,
        keeps_alive=length != -1
        and parser.get_http_version() == "1.1"
        and not _says(found.headers, b"close"),
    )


_parse_known_request = lru_cache(KNOWN)(_parse_request)
_parse_known_answer = lru_cache(KNOWN)(_parse_answer)


def _length(headers: Iterable[tuple[bytes, bytes]], error: type[RbeeError]) -> int | None:
    """Return the length of the body: None if it is chunked, -1 if nothing is said."""
    chunked, length = False, -1
    for name, value in headers:
        if name == b"transfer-encoding":
            if chunked or value.lower() != b"chunked":  # we undo no compression
                raise error(f"the transfer encoding {value[:40]!r} is not supported, chunked is")
            chunked = True
        elif name == b"content-length":
            length = int(value)  # httptools lets digits through only, and one such header
    return None if chunked else length


def _says(headers: Iterable[tuple[bytes, bytes]], word: bytes) -> bool:
    """Tell whether a connection header names ``word``."""
    return any(
        name == b"connection" and word in (part.strip().lower() for part in value.split(b","))
        for name, value in headers
    )


def end_to_end(headers: Headers, *, without: frozenset[bytes] = frozenset()) -> Headers:
    """Return the headers that a relay passes on: none that concern one connection only."""
    dropped = HOP_BY_HOP
    if said := [value for name, value in headers if name == b"connection"]:
        dropped |= {part.strip().lower() for value in said for part in value.split(b",")}
    return tuple([pair for pair in headers if pair[0] not in dropped and pair[0] not in without])


def encode_request(method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    lines = [b"%b %b HTTP/1.1\r\n" % (method.encode("ascii"), target)]
    lines += [b"%b: %b\r\n" % pair for pair in headers]
    return b"".join(lines) + b"\r\n"


def encode_answer(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
    lines += [b"%b: %b\r\n" % pair for pair in headers]
    return b"".join(lines) + b"\r\n"
