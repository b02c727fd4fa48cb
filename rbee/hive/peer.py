"""A worker as its hive talks to it: how it stands, and whether it would go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import attrs

from rbee.errors import ConflictError, RbeeError
from rbee.web.client import PROBE, call, open_client
from rbee.wire import messages
from rbee.wire.messages import ReadyState, StopWorker, WorkerInfo

T = TypeVar("T")


class Peer(Protocol):
    """One worker that has said that it is ready."""

    async def state(self) -> ReadyState | None:
        """Return how it stands; None if it does not answer in time."""
        ...

    async def stop_if_idle(self) -> bool:
        """Have it take no more work; False if it is at work.

        Raises:
            RbeeError: it does not answer; it may have heard all the same.
        """
        ...


Connect = Callable[[WorkerInfo], Peer]


@attrs.frozen
class HttpPeer:
    """A worker by its address; each call is a connection of its own, so nothing is to be closed."""

    url: str
    worker_id: str
    token: str

    async def state(self) -> ReadyState | None:
        try:
            return await self._call("GET", messages.READY, ReadyState)
        except RbeeError:
            return None

    async def stop_if_idle(self) -> bool:
        try:
            await self._call("POST", messages.SHUTDOWN, type(None), StopWorker(if_idle=True))
        except ConflictError:
            return False
        return True

    async def _call(self, method: str, path: str, kind: type[T], body: Any = None) -> T:
        what = f"worker {self.worker_id}"
        async with open_client(self.url, self.token) as client:
            # Its port may be another's by now.
            client.headers[messages.WORKER_ID_HEADER] = self.worker_id
            return await call(client, method, path, kind, body, what=what, limit=PROBE)


def connect_with(token: str) -> Connect:
    """Make the function that reaches a worker over HTTP."""
    return lambda worker: HttpPeer(worker.url, worker.worker_id, token)
