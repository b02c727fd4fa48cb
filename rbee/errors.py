"""The errors of rbee: every class knows its exit code and its HTTP status.

Two families: *ours* (a bad call, a missing thing, a full machine) and *the peer's* (`PeerError`:
another process broke the protocol, died or does not answer).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class RbeeError(Exception):
    """What failed, what was needed, what there was; ``hint`` is one thing to do next."""

    code = "internal"
    http_status = 500
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", code: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or type(self).code
        self.details = details

    def __str__(self) -> str:
        return self.message


class BadInputError(RbeeError):
    code = "bad_input"
    http_status = 400


class UsageError(BadInputError):
    """The command line itself is wrong."""

    code = "usage"
    exit_code = 2


class UnauthorizedError(RbeeError):
    code = "unauthorized"
    http_status = 401


class TooManyFailuresError(UnauthorizedError):
    """The token is missing or wrong again, too soon."""

    code = "too_many_failures"
    http_status = 429


class ForbiddenError(RbeeError):
    code = "forbidden"
    http_status = 403


class NotFoundError(RbeeError):
    code = "not_found"
    http_status = 404


class DeadlineError(RbeeError):
    code = "deadline"
    http_status = 408


class ConflictError(RbeeError):
    code = "conflict"
    http_status = 409


class GoneError(RbeeError):
    """It was there, and is not kept any more."""

    code = "gone"
    http_status = 410


class TooLargeError(RbeeError):
    code = "too_large"
    http_status = 413


class QueueFullError(RbeeError):
    code = "queue_full"
    http_status = 429


class RateLimitedError(RbeeError):
    """A key has had its share; ``details`` holds ``retry_after`` in seconds."""

    code = "rate_limited"
    http_status = 429


class CancelledError(RbeeError):
    """Somebody asked for the end: the client went away or sent DELETE."""

    code = "cancelled"
    http_status = 499


class UnavailableError(RbeeError):
    code = "unavailable"
    http_status = 503


class InsufficientError(RbeeError):
    """Not enough memory or disk; ``details`` holds ``required`` and ``available`` in bytes."""

    code = "insufficient"
    http_status = 507


class MachineError(RbeeError):
    """This machine is not usable as it is: a read-only home, a missing package."""

    code = "machine"


class PeerError(RbeeError):
    """Another process broke the protocol or went away."""

    code = "peer"
    http_status = 502


class ChildExitedError(PeerError):
    """A child ended although nobody asked it to; ``details['log']`` is its log's tail."""

    code = "child_exited"


class OwnerGoneError(PeerError):
    """The owner of this daemon went away, so the daemon ends as well."""

    code = "owner_gone"
    http_status = 503


BY_CODE: dict[str, type[RbeeError]] = {
    cls.code: cls
    for cls in (
        RbeeError, BadInputError, UsageError, UnauthorizedError, ForbiddenError, NotFoundError,
        DeadlineError, ConflictError, TooLargeError, QueueFullError, CancelledError,
        UnavailableError, InsufficientError, MachineError, PeerError, ChildExitedError,
        OwnerGoneError, TooManyFailuresError, GoneError, RateLimitedError,
    )
}  # fmt: skip
BY_STATUS: dict[int, type[RbeeError]] = {
    cls.http_status: cls for cls in reversed(BY_CODE.values()) if cls is not OwnerGoneError
}


def from_wire(
    code: str,
    message: str,
    *,
    hint: str = "",
    status: int = 0,
    details: dict[str, Any] | None = None,
) -> RbeeError:
    """Rebuild the error that a peer sent; an unknown code keeps its name on the nearest class."""
    cls = BY_CODE.get(code) or BY_STATUS.get(status, RbeeError)
    error = cls(message, hint=hint, code=code)
    error.details = dict(details or {})
    return error


def leaves(group: BaseException) -> Iterator[BaseException]:
    """Yield the plain exceptions of a (nested) group."""
    if isinstance(group, BaseExceptionGroup):
        for member in group.exceptions:
            yield from leaves(member)
    else:
        yield group
