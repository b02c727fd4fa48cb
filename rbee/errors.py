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

# What a code says more closely; on the wire an event tells no status, so the code tells the class.
CLOSER: dict[type[RbeeError], str] = {
    RbeeError: "dequantise_failed",
    BadInputError: (
        "ambiguous_model bad_alias bad_dtype bad_endpoint bad_reference bad_ssh_config "
        "corrupt_model corrupt_package key_not_private missing_weights no_safetensors "
        "no_such_device not_a_model split_gguf unknown_architecture unreadable unsafe_package"
    ),
    UnauthorizedError: "hub_unauthorized",
    ForbiddenError: (
        "gated_model model_not_allowed not_for_keys option_not_allowed origin unknown_host"
    ),
    NotFoundError: (
        "model_not_found model_not_here revision_not_found unknown_alias unknown_engine "
        "unknown_job unknown_key unknown_model unknown_node unknown_wheelhouse unknown_worker"
    ),
    ConflictError: (
        "attached job_exists model_busy model_in_use no_lease node_exists not_owned other_home "
        "other_storm other_version other_worker port_taken queen_running reserved_node worker_busy"
    ),
    GoneError: "events_gone job_gone",
    UnavailableError: (
        "database_busy hive_lost hive_unreachable hub_offline hub_unreachable load_timeout "
        "no_queen not_reachable queen_stopping unreachable unresponsive worker_stopped "
        "worker_stopping"
    ),
    InsufficientError: "insufficient_disk insufficient_memory",
    MachineError: (
        "bad_token database_damaged database_newer engine_failed engine_missing home_not_writable "
        "missing_package no_gpu not_installed run_dir_not_private stale_installation stuck "
        "token_file_open unverified"
    ),
    PeerError: (
        "canary_failed engine engine_died hub_failed not_stopped stalled stream_broken wrong_hash"
    ),
    ChildExitedError: "worker_died",
}
BY_CODE |= {code: cls for cls, codes in CLOSER.items() for code in codes.split()}


def from_wire(
    code: str,
    message: str,
    *,
    hint: str = "",
    status: int = 0,
    details: dict[str, Any] | None = None,
) -> RbeeError:
    """Rebuild the error that a peer sent; an unknown code keeps its name on the nearest class."""
    cls = BY_CODE.get(code, RbeeError)
    if status not in (0, cls.http_status):  # a code of two classes, or one of another version
        cls = BY_STATUS.get(status, cls)
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
