"""The request that is being answered: its id, and how much of its time others took.

It is found from wherever the request is worked at, also in tasks that began there. A task that
outlives the request finds a trace that is over.

What runs around every request is a class here, and not a generator, which takes three times as
long to enter and leave.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable
from contextvars import ContextVar, Token

import attrs

REQUEST_ID = b"x-request-id"
LONGEST = 128

_VALID = re.compile(rb"[A-Za-z0-9._~:/+=@-]{1,%d}" % LONGEST)
_current: ContextVar[Trace | None] = ContextVar("rbee_trace", default=None)


@attrs.define(eq=False)
class Trace:
    """One request at one daemon.

    Attributes:
        began: when its head was here, in seconds of `time.monotonic`.
        elsewhere: seconds for which others were waited for: the client, a worker.
        queued: seconds of them for which there was no worker that could take it.
        model: that of the worker which had it last, "" if it came to none.
        overhead: seconds that this daemon itself took until the answer began; None before.
        error: the code of what it ended with, "" if with nothing.
        is_told: whether the last event of the answer is on its way: a client may leave then.
        is_over: whether it is answered.
    """

    id: str
    began: float = attrs.field(factory=time.monotonic)
    elsewhere: float = 0.0
    queued: float = 0.0
    model: str = ""
    overhead: float | None = None
    error: str = ""
    is_told: bool = False
    is_over: bool = False
    _wants_worker_since: float | None = None

    def want_worker(self) -> None:
        """From now on it waits for a worker."""
        self._wants_worker_since = time.monotonic()

    def come_to_worker(self, model: str) -> None:
        """From now on it is at a worker of ``model``, until it wants another one."""
        now = time.monotonic()
        waited = now - (self._wants_worker_since or now)
        self.queued += waited
        self.elsewhere += waited
        self.model = model

    def note_head(self) -> float:
        """Note that the answer begins now; return the overhead."""
        if self.overhead is None:
            self.overhead = max(0.0, time.monotonic() - self.began - self.elsewhere)
        return self.overhead


def trace_of(headers: Iterable[tuple[bytes, bytes]]) -> Trace:
    """Make the trace of a request: with the id it came with, a new one if that will not do."""
    given = next((value for name, value in headers if name == REQUEST_ID), b"")
    return Trace(given.decode("ascii") if _VALID.fullmatch(given) else new_request_id())


def new_request_id() -> str:
    return f"req-{random.getrandbits(64):016x}"  # no secret, so no system call


def current() -> Trace:
    """Return the trace that this task works at; a new one if it works at none."""
    return _current.get() or Trace(new_request_id())


def running_id() -> str:
    """Return the id of the request that is being answered here; "" if none is."""
    trace = _current.get()
    return "" if trace is None or trace.is_over else trace.id


def forwarded() -> dict[str, str]:
    """Return the header by which a peer knows the request that is being answered here, if any."""
    return {REQUEST_ID.decode(): name} if (name := running_id()) else {}


class Tracing:
    """Makes a trace the current one of this task, and of those that begin in the body."""

    __slots__ = ("_before", "_trace")

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __enter__(self) -> None:
        self._before: Token[Trace | None] = _current.set(self._trace)

    def __exit__(self, *_: object) -> None:
        self._trace.is_over = True
        _current.reset(self._before)


class Elsewhere:
    """Counts the seconds of the body as those of others."""

    __slots__ = ("_began",)

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        if (trace := _current.get()) is not None:
            trace.elsewhere += time.monotonic() - self._began
