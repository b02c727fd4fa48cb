"""Asking a worker: what every request to one carries, and what its end means."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from rbee.errors import PeerError
from rbee.queen.assignments import Assignments
from rbee.queen.hive import Hive
from rbee.trace import current
from rbee.web.door import Headers
from rbee.web.exchange import Address
from rbee.web.upstream import Asking, Upstreams
from rbee.wire import messages
from rbee.wire.messages import WorkerInfo

STALL = 65.0  # seconds of silence in a stream; a worker itself gives up after 60 without a token


async def ask_at(
    assignments: Assignments,
    worker: WorkerInfo,
    ask: Callable[[Hive], Awaitable[None]],
    has_begun: Callable[[], bool],
) -> None:
    """Have a worker answer, until its node is lost.

    Raises:
        ChildExitedError: the answer broke off after it had begun.
        RbeeError: what ``ask`` raised otherwise; the node is lost.
    """
    hive, trace = assignments.hive_of(worker), current()
    with hive.relaying() as scope:
        trace.come_to_worker(worker.model)
        try:
            await ask(hive)
        except PeerError as exc:
            if not has_begun() or exc.code == "stalled":
                raise
            raise await assignments.broken(worker) from exc
        finally:
            trace.want_worker()
    if scope.cancelled_caught:
        raise await assignments.lost(worker, has_begun=has_begun())


def open_answer(
    upstreams: Upstreams,
    hive: Hive,
    worker: WorkerInfo,
    path: str,
    headers: Headers,
    body: bytes,
    silence: float,
) -> Asking:
    """Send a worker a request; the body runs once the answer's head is there.

    Raises:
        UnavailableError: it is not there, or nothing came for ``silence`` seconds.
        PeerError: it broke off.
    """
    address = Address.parse(hive.way_to(worker.url))
    what = f"worker {worker.worker_id}"
    own = (
        (b"host", address.authority.encode()),
        (b"authorization", b"Bearer " + hive.token.encode()),
        (messages.WORKER_ID_HEADER.encode(), worker.worker_id.encode()),
    )
    return upstreams.ask(
        address, "POST", path.encode(), (*own, *headers), body, what, within=silence
    )
