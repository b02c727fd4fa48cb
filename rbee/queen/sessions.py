"""Sessions: what belongs together goes to one worker, whose cache has its beginning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from rbee.web.router import Request
from rbee.wire.messages import WorkerInfo

HEADER = b"x-session-id"  # as other routers for language models have it
KEPT = 10_000  # sessions that are remembered; the one that is longest silent is forgotten
LONGEST = 255  # characters of a name


def session_of(request: Request) -> str:
    """Return the name of the session that a request belongs to; "" for none."""
    name = request.headers.get(HEADER, b"").decode("latin-1")
    if not name or len(name) > LONGEST:
        return ""
    return f"{request.caller.name}/{name}" if request.caller else name


class Sessions:
    """Which worker each session was at last."""

    def __init__(self) -> None:
        self._workers: OrderedDict[tuple[str, str], str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._workers)

    def find(self, model: str, name: str, workers: Iterable[WorkerInfo]) -> WorkerInfo | None:
        """Return the one of ``workers`` that a session was at last."""
        last = self._workers.get((model, name)) if name else None
        return next((one for one in workers if one.worker_id == last), None)

    def note(self, model: str, name: str, worker: WorkerInfo) -> None:
        if not name:
            return
        self._workers[model, name] = worker.worker_id
        self._workers.move_to_end((model, name))
        if len(self._workers) > KEPT:
            self._workers.popitem(last=False)
