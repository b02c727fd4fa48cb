"""A worker as its hive talks to it: how it stands, and whether it would go."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import attrs
import httpx
import trio

from rbee.errors import BadInputError, RbeeError
from rbee.web.client import PROBE, call, open_client
from rbee.wire import codec, messages
from rbee.wire.messages import ReadyState, StopWorker, WorkerInfo


class Peer(Protocol):
    """One worker that has said that it is ready."""

    async def state(self) -> ReadyState | None:
        """Return how it stands; None if it does not answer in time."""
        ...

    async def stop_if_idle(self) -> bool:
        """Have it take no more work; False if it is at work, or does not answer."""
        ...


class Connect(Protocol):
    def __call__(self, worker: WorkerInfo) -> AbstractAsyncContextManager[Peer]: ...


@attrs.frozen
class HttpPeer:
    client: httpx.AsyncClient
    name: str

    async def state(self) -> ReadyState | None:
        with trio.move_on_after(PROBE):
            try:
                answer = await self.client.get(messages.READY)
                # 503 as well: one that is stopping answers, too.
                return codec.loads(answer.content, ReadyState)
            except (httpx.HTTPError, BadInputError):
                return None
        return None

    async def stop_if_idle(self) -> bool:
        try:
            body = StopWorker(if_idle=True)
            await call(self.client, "POST", messages.SHUTDOWN, type(None), body, what=self.name)
        except RbeeError:  # busy, or whatever keeps it from answering: not known to be idle
            return False
        return True


def connect_with(token: str) -> Connect:
    """Make the function that opens a worker's HTTP."""

    @asynccontextmanager
    async def connect(worker: WorkerInfo) -> AsyncGenerator[Peer, None]:
        async with open_client(worker.url, token) as client:
            yield HttpPeer(client, f"worker {worker.worker_id}")

    return connect
