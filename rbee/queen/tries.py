"""Tries: a request goes to another worker when the one that it came to was gone, within reason."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from rbee.errors import ConflictError, PeerError, RbeeError, UnauthorizedError, UnavailableError
from rbee.queen.assignments import Assignments
from rbee.queen.attempts import Narrate
from rbee.queen.waiting_room import Asked, Terms
from rbee.trace import current
from rbee.wire.messages import WorkerInfo

TRIES = 3  # workers that may be gone when a request comes to them: unloaded, or lost

# Another may have the port of one that is gone, and refuse our token or the request.
GONE = (UnavailableError, ConflictError, UnauthorizedError, PeerError)


async def ask_until_answered(
    assignments: Assignments,
    asked: Asked,
    narrate: Narrate,
    ask: Callable[[WorkerInfo], Awaitable[None]],
    has_begun: Callable[[], bool],
    terms: Terms,
) -> None:
    """Have a worker answer; another one as long as nothing of an answer has come.

    A worker that died may have died of the request: one other gets it then, and no third.

    Args:
        ask: has a worker answer, and raises if it does not.
        has_begun: whether something of its answer has been passed on.
        terms: how it stands among the requests that wait for one.

    Raises:
        RbeeError: why there is no worker, or what the last one raised.
    """
    current().want_worker()
    claim = assignments.claim(asked, terms)
    deaths = 0
    for left in reversed(range(TRIES)):
        async with assignments.open_slot(claim, narrate) as worker:
            try:
                await ask(worker)
                return
            except GONE as exc:
                if has_begun() or not left or exc.code == "unresponsive":
                    raise
                assignments.note_absent(worker, exc)
                deaths += _is_death(exc) and not assignments.is_forwarded(worker)
                if deaths > 1:
                    raise await assignments.broken(worker) from exc


def _is_death(error: RbeeError) -> bool:
    """Tell it from one who was gone before: a forward takes each connection, and hangs up."""
    return isinstance(error, PeerError)
