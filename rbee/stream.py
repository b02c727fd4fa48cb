"""A job's events as a client reads them, and the answer that they make.

`TaskEvents` does no I/O, so that every style of concurrency shares it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypedDict

import attrs

from rbee.errors import OwnerGoneError, PeerError, RbeeError, from_wire
from rbee.web.exchange import Exchange
from rbee.wire import messages, sse
from rbee.wire.messages import End, Event, Queued, Started, Token

OPERATOR = "operator"
KEEP_A_QUEEN = "rbee-keeper queen start   # a queen that does not end with somebody's command"

Start = Callable[[], Awaitable[Exchange]]
"""Sends the request and returns once the head of its answer is there."""


class TaskOptions(TypedDict, total=False):
    """What a request may say beyond model and prompt; see `rbee.wire.messages.TaskRequest`."""

    raw: bool
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop: tuple[str, ...]
    seed: int
    node: str
    backend: str
    device: str
    engine: str
    max_model_len: int
    dtype: str
    keep_alive: float
    priority: int
    deadline: float


@attrs.frozen
class Answer:
    """What a job has answered.

    Attributes:
        stop_reason: ``stop`` (it was done) or ``length`` (``max_tokens`` were).
        ttft_ms, duration_ms: milliseconds until the first token, and in all, as the worker saw.
    """

    text: str
    job_id: str
    worker_id: str
    node: str
    model: str
    tokens_in: int
    tokens_out: int
    stop_reason: str
    ttft_ms: float
    duration_ms: float

    def __str__(self) -> str:
        return self.text


class TaskEvents:
    """Turn a job's ``(name, data)`` pairs into typed events and hold it to its one terminal event.

    ``job_id`` is "" until the first event that tells it.
    """

    def __init__(self, job_id: str = "") -> None:
        self.job_id = job_id
        self.ended = False
        self._parts: list[str] = []
        self._started: Started | None = None
        self._end: End | None = None

    def event(self, name: str, data: str) -> Event | None:
        """Return the event, or None for one to skip; raise the error that an ``error`` carries."""
        event = sse.event_from(name, data)
        if isinstance(event, Token):
            self._parts.append(event.t)
        elif event is not None:
            self._take(event)
        return event

    def _take(self, event: Event) -> None:
        if isinstance(event, messages.Error):
            self.ended = True
            raise error_of_event(event)
        if isinstance(event, End):
            self.ended = True
            self._end = event
        elif isinstance(event, Queued | Started):
            self.job_id = self.job_id or event.job_id
            self._started = event if isinstance(event, Started) else self._started

    def answer(self) -> Answer:
        """Return the whole answer; call it when the job has ended well."""
        end, started = self._end, self._started
        if end is None or started is None:
            raise self.broken_off()
        return Answer(
            "".join(self._parts), self.job_id, started.worker_id, started.node, started.model,
            end.tokens_in, end.tokens_out, end.stop_reason, end.ttft_ms, end.duration_ms,
        )  # fmt: skip

    def broken_off(self) -> PeerError:
        """Return the error for bytes that end before the job does."""
        return PeerError("stream ended without a terminal event", code="stream_broken")


def error_of_event(event: messages.Error) -> RbeeError:
    hint = event.hint
    if event.code == OwnerGoneError.code and not hint:
        hint = KEEP_A_QUEEN
    return from_wire(event.code, event.message, hint=hint, details=event.details)


class PairStream:
    """Read the ``(name, data)`` pairs of one exchange; ``last_id``: the number of the last one."""

    def __init__(self, exchange: Exchange, owner: str = "") -> None:
        self._exchange = exchange
        self._owner = owner
        self._decoder = sse.Decoder()
        self._pairs: deque[tuple[str, str, int]] = deque()
        self.last_id = 0

    async def next(self) -> tuple[str, str]:
        """Return the next pair.

        Raises:
            OwnerGoneError: the stream broke off at a queen that somebody owns: it has ended.
            PeerError: it broke off otherwise.
        """
        try:
            while not self._pairs:
                chunk = await self._exchange.chunk()
                if not chunk:
                    raise TaskEvents().broken_off()
                self._pairs.extend(self._decoder.feed_numbered(chunk))
            name, data, self.last_id = self._pairs.popleft()
            return name, data
        except PeerError as exc:
            if self._owner in ("", OPERATOR):
                raise
            raise OwnerGoneError(
                f"the queen ended with its owner {self._owner} before the answer did ({exc})",
                hint=KEEP_A_QUEEN,
            ) from exc


class TaskStream:
    """Iterate a job's events as they come; ends after ``end``.

    It starts with the first event that is asked for, or with ``async with``. Leaving it before its
    end (the block, or the loop when nobody holds the stream any more) cancels the job.

    Iterating raises the job's error, `PeerError` if the stream breaks off, and `OwnerGoneError`
    if it breaks off at a queen that somebody owns: it has ended with that owner.
    """

    _exchange: Exchange | None = None
    _pairs: PairStream
    _closed = False

    def __init__(self, start: Start, owner: str = "") -> None:
        self._start = start
        self._owner = owner
        self._events = TaskEvents()

    @property
    def job_id(self) -> str:
        """The job's id; "" until it has started."""
        return self._events.job_id

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream has ended well; `PeerError` before."""
        return self._events.answer()

    async def __aenter__(self) -> TaskStream:
        await self._open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __aiter__(self) -> TaskStream:
        return self

    async def __anext__(self) -> Event:
        while not self._events.ended and not self._closed:
            event = self._events.event(*await self._next_pair())
            if event is not None:
                return event
        self.close()
        raise StopAsyncIteration

    def text(self) -> TextStream:
        """Iterate the pieces of text only."""
        return TextStream(self)

    def close(self) -> None:
        """Let go of the job, which cancels it if it has not ended; safe to call again."""
        self._closed = True
        if self._exchange is not None:
            self._exchange.abort()

    def __del__(self) -> None:
        self.close()

    async def _next_pair(self) -> tuple[str, str]:
        await self._open()
        return await self._pairs.next()

    async def _open(self) -> None:
        if self._exchange is None:
            self._exchange = await self._start()
            self._pairs = PairStream(self._exchange, self._owner)
            told = self._exchange.headers.get(messages.JOB_ID_HEADER, "")
            self._events.job_id = self._events.job_id or told


class TextStream:
    """Iterate the text of a job as it comes; it holds the job as its `TaskStream` does."""

    def __init__(self, events: TaskStream) -> None:
        self._events = events

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> str:
        while True:
            event = await anext(self._events)
            if isinstance(event, Token):
                return event.t
