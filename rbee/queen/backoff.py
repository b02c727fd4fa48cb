"""Failed loads are remembered: a model that does not load is not tried again in a storm."""

from __future__ import annotations

import hashlib

import attrs
import trio

from rbee.errors import RbeeError, from_wire
from rbee.wire import codec
from rbee.wire.messages import StartWorker

FIRST, LONGEST = 1.0, 60.0
PASSING = frozenset({"insufficient_memory", "hive_lost", "worker_lost", "worker_stopped"})


@attrs.frozen
class Failure:
    """The last failure of one start. ``at`` and ``until`` are trio's time."""

    worker_id: str
    error: RbeeError
    times: int
    at: float
    until: float


class Backoff:
    """Failures by what was to be started.

    One may be an accident (a worker that was killed), so the next try comes at once; after that
    each one in a row doubles the pause, 1 … 60 s. What the user can put right (a wrong path, a
    damaged file) he tries again soon: it stays at 1 s.
    """

    def __init__(self) -> None:
        self._failures: dict[bytes, Failure] = {}

    def check(self, request: StartWorker) -> None:
        """Raise the remembered error while it is too early for another try."""
        failure = self._failures.get(_key(request))
        now = trio.current_time()
        if failure is None or now >= failure.until:
            return
        error = failure.error
        left = failure.until - now
        message = (
            f"{error.message}\nthat was {now - failure.at:.0f} s ago, at try {failure.times}; "
            f"the next try is possible in {left:.0f} s"
        )
        raise from_wire(
            error.code, message, hint=error.hint, status=error.http_status,
            details={**error.details, "retry_after": round(left, 1)},
        )  # fmt: skip

    def note_failure(self, request: StartWorker, worker_id: str, error: RbeeError) -> None:
        """Remember a failed start, once for all who waited for it.

        What passes by itself (memory that is in use) is not remembered.
        """
        now = trio.current_time()
        before = self._failures.get(_key(request))
        if error.code in PASSING or (before is not None and before.worker_id == worker_id):
            return
        times = before.times + 1 if before and now < before.until + LONGEST else 1
        pause = _pause(times, grows=error.http_status >= 500)
        self._failures[_key(request)] = Failure(worker_id, error, times, now, now + pause)
        self._forget_old(now)

    def note_success(self, request: StartWorker) -> None:
        self._failures.pop(_key(request), None)

    def _forget_old(self, now: float) -> None:
        for key, failure in list(self._failures.items()):
            if now > failure.until + LONGEST:
                del self._failures[key]


def _pause(times: int, *, grows: bool) -> float:
    if times == 1:
        return 0.0
    return min(LONGEST, FIRST * 2 ** min(times - 2, 10)) if grows else FIRST


def _key(request: StartWorker) -> bytes:
    """Tell starts apart, by their access to a hub too, which is not to be kept."""
    return hashlib.sha256(codec.dumps(attrs.evolve(request, keep_alive=None))).digest()
