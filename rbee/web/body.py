"""Bodies of HTTP/1.1 messages as they come: what of the bytes is body, and where it ends."""

from __future__ import annotations

import re
from typing import Protocol

from rbee.errors import BadInputError, RbeeError
from rbee.web.head import AnswerHead

MAX_LINE = 256  # bytes of a chunk's size with its extensions
MAX_TRAILER = 8 << 10

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t -~\x80-\xff]*)?")
_LINE = re.compile(rb"(0*[1-9A-Fa-f][0-9A-Fa-f]{0,7})\r\n")
_CRLF = b"\r\n"


class Body(Protocol):
    """Takes the bytes behind a head.

    Attributes:
        done: whether the body has ended.
        rest: what came behind its end.
        ends_with_connection: whether the end of the connection is that of the body.
    """

    done: bool
    rest: bytes
    ends_with_connection: bool

    def feed(self, data: bytes) -> bytes:
        """Return what of the bytes is body; raise the error it was made with if none could be."""
        ...


class Counted:
    """A body of a known length."""

    ends_with_connection = False

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        left = self._left
        if len(data) < left:
            self._left = left - len(data)
            return data
        self._left = 0
        self.done = True
        self.rest += data[left:]
        return data[:left]


class UntilClosed:
    """A body that ends with its connection."""

    ends_with_connection = True

    def __init__(self) -> None:
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        return data


class Chunked:
    """A chunked body; extensions and trailers are dropped."""

    ends_with_connection = False

    def __init__(self, error: type[RbeeError] = BadInputError) -> None:
        self._error = error
        self._left = 0  # of the chunk, with the CRLF behind it
        self._line = b""  # the begin of a line whose end has not come
        self._trailer = -1  # bytes of it so far; -1 before the last chunk
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        if not self._left and not self._line and self._trailer < 0:
            line = _LINE.match(data)
            if line and len(data) - line.end() - 2 == int(line[1], 16) and data.endswith(_CRLF):
                return data[line.end() : -2]  # one chunk, as most tokens come
        if self._line:
            data, self._line = self._line + data, b""
        pieces: list[bytes] = []
        at, size = 0, len(data)
        while at < size and not self.done:
            if self._left > 2:
                piece = data[at : at + self._left - 2]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
            elif self._left:
                at = self._end_chunk(data, at)
            else:
                at = self._take_line(data, at)
        if self.done:
            self.rest += data[at:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _end_chunk(self, data: bytes, at: int) -> int:
        """Take of the CRLF behind a chunk what is there."""
        have = data[at : at + self._left]
        if not _CRLF[-self._left :].startswith(have):
            raise self._error("a chunk is longer than its size says")
        self._left -= len(have)
        return at + len(have)

    def _take_line(self, data: bytes, at: int) -> int:
        """Take the line with a chunk's size, or one of the trailer."""
        end = data.find(_CRLF, at)
        line = data[at : end if end >= 0 else len(data)]
        if len(line) > (MAX_LINE if self._trailer < 0 else MAX_TRAILER - self._trailer):
            raise self._error("a chunk's size or the trailer of a body is too long")
        if b"\n" in line:  # for some the end of the line, so of the body: nobody is to disagree
            raise self._error("a line of a chunked body ends with LF alone")
        if end < 0:
            self._line = line
            return len(data)
        if self._trailer < 0:
            self._begin_chunk(line)
        elif line:
            self._trailer += len(line)
        else:
            self.done = True
        return end + len(_CRLF)

    def _begin_chunk(self, line: bytes) -> None:
        match = _SIZE.fullmatch(line)
        if match is None:
            raise self._error(f"{line[:40]!r} is no size of a chunk")
        if size := int(match[1], 16):
            self._left = size + len(_CRLF)
        else:
            self._trailer = 0


def body_of_request(length: int | None) -> Body:
    """Make the body of a request; ``length`` is None for a chunked one."""
    return Chunked() if length is None else Counted(length)


def body_of_answer(head: AnswerHead, error: type[RbeeError]) -> Body:
    if head.chunked:
        return Chunked(error)
    return UntilClosed() if head.length is None else Counted(head.length)


def chunk(data: bytes) -> bytes:
    """Frame one chunk; of nothing there is none, for it would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


LAST_CHUNK = b"0\r\n\r\n"
