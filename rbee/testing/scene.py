"""What goes on in a cluster when a fault comes: requests on their way, streams that run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs
import trio

from rbee.client import AsyncClient
from rbee.errors import RbeeError
from rbee.testing.cluster import Workload
from rbee.wire.messages import StartWorker, TaskRequest, Token, WorkerInfo

TOKENS = 400  # of a stream: more than any round waits for
CONTEXT = 1000  # of the first worker; each has another, which tells them apart
KEPT = 600.0  # seconds without work that a worker stays: longer than any round
BROKEN = "stream_broken"  # it ended without its terminal event


@attrs.define(eq=False)
class Request:
    """One request on its way; ``end`` is "" until it has ended, then ``end`` or an error's code."""

    what: str
    node: str
    end: str = ""
    error: str = ""
    worker: int = 0
    seen: int = 0
    over: trio.Event = attrs.field(factory=trio.Event)

    async def keep(self, call: Callable[[], Awaitable[object]]) -> None:
        """Wait for its end, in whatever way it comes."""
        try:
            await call()
            self.end = "end"
        except RbeeError as exc:
            self.end, self.error = exc.code, str(exc)
        finally:
            self.over.set()


@attrs.define(eq=False)
class Scene:
    """The requests of one round."""

    client: AsyncClient
    workload: Workload
    nursery: trio.Nursery
    requests: list[Request] = attrs.field(factory=list)
    streams: list[Request] = attrs.field(factory=list)

    def start_worker(self, node: str, number: int, *, state: str = "") -> Request:
        start = wanted(self.workload, node, number, state)

        async def call() -> None:
            await self.client.start_worker(start)

        return self._begin(Request(f"start of a worker on {node}", node), call)

    def stop_worker(self, info: WorkerInfo) -> Request:
        async def call() -> None:
            await self.client.stop_worker(info.worker_id)

        return self._begin(Request(f"stop of a worker on {info.node}", info.node), call)

    def stop_hive(self, node: str) -> Request:
        async def call() -> None:
            await self.client.stop_hive(node)

        return self._begin(Request(f"stop of the hive on {node}", node), call)

    def _begin(self, request: Request, call: Callable[[], Awaitable[object]]) -> Request:
        self.requests.append(request)
        self.nursery.start_soon(request.keep, call)
        return request

    def stream(self, info: WorkerInfo) -> Request:
        """Let a worker answer until the scene is over."""
        stream = Request(f"stream from {info.node}", info.node, worker=info.pid)
        task = TaskRequest(
            info.model, prompt="one two three", node=info.node, engine=info.engine,
            max_model_len=info.max_model_len, max_tokens=TOKENS, temperature=0.0,
        )  # fmt: skip

        async def call() -> None:
            async with self.client.stream(task) as events:
                async for event in events:
                    stream.seen += isinstance(event, Token)

        self.streams.append(stream)
        self.nursery.start_soon(stream.keep, call)
        return stream

    async def ask(self, node: str) -> Request:
        """Have a node answer a short question; return when it has, or has said why not."""
        request = Request(f"request to {node}", node)
        model = self.workload.model_for("idle")
        task = TaskRequest(
            model, prompt="one two", node=node, engine=self.workload.engine, max_tokens=3,
            temperature=0.0, max_model_len=CONTEXT, keep_alive=KEPT,
        )  # fmt: skip

        async def call() -> None:
            async with self.client.stream(task) as events:
                async for event in events:
                    request.seen += isinstance(event, Token)

        await request.keep(call)
        return request


def wanted(workload: Workload, node: str, number: int, state: str = "") -> StartWorker:
    """Return the request for a worker that no other number's is."""
    return StartWorker(
        workload.model_for(state), engine=workload.engine, node=node,
        max_model_len=CONTEXT + 1 + number, keep_alive=KEPT,
    )  # fmt: skip


def number_of(info: WorkerInfo) -> int:
    """Return the number that a worker was `wanted` with; a negative one if it was not."""
    return (info.max_model_len or 0) - CONTEXT - 1
