"""Requests to workers on connections that stay: taken and given back in O(1), the last one first.

httpx's pool looks at every connection at every request, and wedges for good when requests are
cancelled while others queue for it; this is what token streams use instead.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from functools import partial

import attrs
import trio

from rbee.errors import PeerError, UnavailableError
from rbee.trace import Elsewhere
from rbee.web.body import Body, body_of_answer
from rbee.web.client import answering_within
from rbee.web.exchange import BROKEN, Address
from rbee.web.head import MAX_HEAD, AnswerHead, Headers, encode_request, parse_answer
from rbee.web.line import Line, open_line
from rbee.web.pace import Pace
from rbee.web.poller import HUNG_UP, IN, Poller
from rbee.web.transport import CONNECT

IDLE = 30.0  # seconds after which a connection is not used again
KEPT = 256  # idle connections to one worker


@attrs.define(eq=False)
class Answer:
    """The answer to one request: its head is here, its body comes.

    Whoever reads the body by other means than `chunk` goes on from ``first`` with ``body``, and
    tells ``pace``, if there is one, of each piece.
    """

    head: AnswerHead
    body: Body
    first: bytes
    _line: Line
    _what: str
    pace: Pace | None = None

    def fileno(self) -> int:
        """Return the descriptor that the rest of the body comes from."""
        return self._line.fileno()

    async def chunk(self) -> bytes:
        """Return what has come of the body, b"" at its end.

        Raises:
            PeerError: it breaks off.
        """
        data, self.first = self.first, b""
        while not data and not self.body.done:
            data = await self._receive()
        if data and self.pace is not None:
            self.pace.piece(data, time.monotonic())
        return data

    async def _receive(self) -> bytes:
        try:
            data = await self._line.receive()
        except OSError as exc:
            raise PeerError(f"{self._what} broke the connection", code=BROKEN) from exc
        if data:
            return self.body.feed(data)
        if not self.body.ends_with_connection:
            raise PeerError(f"{self._what} ended in the middle of the answer", code=BROKEN)
        self.body.done = True
        return b""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left, so that its connection can take another request."""
        return self.body.done and not self.body.rest and self.head.keeps_alive


class _Idle:
    """A connection that waits for its next request."""

    __slots__ = ("line", "since")

    def __init__(self, line: Line) -> None:
        self.line = line
        self.since = trio.current_time()


class Upstreams:
    """The connections of one server to its workers; made by `open_upstreams`."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._idle: dict[tuple[str, int], list[_Idle]] = {}

    def ask(
        self,
        address: Address,
        method: str,
        target: bytes,
        headers: Headers,
        body: bytes,
        what: str,
        *,
        within: float = float("inf"),
    ) -> Asking:
        """Send a request; the ``async with`` runs once the answer's head is there.

        Leaving it before the body has ended closes the connection, which is how a worker learns
        that nobody wants the rest. A request is sent again, once, only if a connection that had
        been used before ended without a byte of an answer.

        Raises:
            UnavailableError: nobody answers at the address within 5 s; nothing was sent. Or, as
                ``unresponsive``, the head of the answer has not come ``within`` seconds.
            PeerError: whoever answers breaks off or does not speak HTTP.
        """
        head = encode_request(method, target, (*headers, (b"content-length", b"%d" % len(body))))
        return Asking(self, address, head + body, what, within)

    async def _exchange(self, address: Address, request: bytes, what: str) -> tuple[Line, Answer]:
        used = self._take(address)
        if used is not None and (answer := await _try(used, request, what, is_used=True)):
            return used, answer
        try:
            line = await _connect(address, what)
        except UnavailableError as exc:
            if used is None:
                raise
            # It may have had the request already, and died of it.
            raise PeerError(
                f"{what} closed the connection before it answered", code=BROKEN
            ) from exc
        answer = await _try(line, request, what, is_used=False)
        assert answer is not None
        return line, answer

    # idle connections ------------------------------------------------------------------------
    def _take(self, address: Address) -> Line | None:
        idle = self._idle.get((address.host, address.port))
        if not idle:
            return None
        if trio.current_time() - idle[-1].since > IDLE:  # and so it is with all below
            self._drop(address)
            return None
        line = idle.pop().line
        self._poller.remove(line.fileno())
        return line

    def _keep(self, address: Address, line: Line) -> None:
        idle = self._idle.setdefault((address.host, address.port), [])
        if len(idle) >= KEPT:
            line.close()
            return
        kept = _Idle(line)
        idle.append(kept)
        # Its end is seen at once: nothing can come on it any more.
        self._poller.add(line.fileno(), IN | HUNG_UP, partial(self._lose, address, idle, kept))

    def _lose(self, address: Address, idle: list[_Idle], kept: _Idle, events: int) -> None:
        idle.remove(kept)
        self._close(kept)
        if not idle:
            self._idle.pop((address.host, address.port), None)

    def _drop(self, address: Address) -> None:
        for kept in self._idle.pop((address.host, address.port), []):
            self._close(kept)

    def _close(self, kept: _Idle) -> None:
        self._poller.remove(kept.line.fileno())
        kept.line.close()

    def close(self) -> None:
        for idle in self._idle.values():
            for kept in idle:
                self._close(kept)
        self._idle.clear()


class Asking:
    """A request that is sent, and its answer, while the body of the ``async with`` runs."""

    __slots__ = ("_address", "_answer", "_line", "_request", "_upstreams", "_what", "_within")

    def __init__(
        self, upstreams: Upstreams, address: Address, request: bytes, what: str, within: float
    ) -> None:
        self._upstreams = upstreams
        self._address = address
        self._request = request
        self._what = what
        self._within = within

    async def __aenter__(self) -> Answer:
        asking = self._upstreams._exchange(self._address, self._request, self._what)
        if self._within == float("inf"):
            self._line, self._answer = await asking
        else:
            with answering_within(self._within, self._what):
                self._line, self._answer = await asking
        return self._answer

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._answer.is_over:
            self._upstreams._keep(self._address, self._line)
        else:
            self._line.close()


@asynccontextmanager
async def open_upstreams(poller: Poller) -> AsyncGenerator[Upstreams, None]:
    """Keep connections while the body runs."""
    upstreams = Upstreams(poller)
    try:
        yield upstreams
    finally:
        upstreams.close()


async def _connect(address: Address, what: str) -> Line:
    try:
        with trio.fail_after(CONNECT):
            return await open_line(address.host, address.port)
    except trio.TooSlowError as exc:
        raise UnavailableError(
            f"{what} did not answer within {CONNECT:.0f} s", code="unreachable"
        ) from exc
    except OSError as exc:
        raise UnavailableError(f"{what} does not answer: {exc}", code="unreachable") from exc


async def _try(line: Line, request: bytes, what: str, *, is_used: bool) -> Answer | None:
    """Send a request and read the head of its answer; None if a used connection was over.

    The connection is closed unless there is an answer.
    """
    answer = None
    try:
        # Whoever refuses early may have closed already; the answer tells.
        with suppress(OSError):
            await line.send(request)
        with Elsewhere():
            answer = await _read_answer(line, what, is_used=is_used)
        return answer
    finally:
        if answer is None:
            line.close()


async def _read_answer(line: Line, what: str, *, is_used: bool) -> Answer | None:
    data = b""
    while True:
        try:
            piece = await line.receive()
        except OSError:
            piece = b""
        if not piece:
            if is_used and not data:
                return None
            raise PeerError(f"{what} closed the connection before it answered", code=BROKEN)
        data += piece
        while end := _end_of_head(data, what):
            head = parse_answer(data[:end])
            data = data[end:]
            if head.status >= 200:
                body = body_of_answer(head, PeerError)
                return Answer(head, body, body.feed(data) if data else b"", line, what)


def _end_of_head(data: bytes, what: str) -> int:
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD)
    if end < 0 and len(data) >= MAX_HEAD:
        raise PeerError(f"{what} sent a head of more than {MAX_HEAD} bytes")
    return end + 4 if end >= 0 else 0
