"""A cluster for a program in asyncio, which a program without it need not import."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from rbee.cluster import ClusterOptions
from rbee.threaded import Cluster


@asynccontextmanager
async def open_beside_asyncio(options: ClusterOptions) -> AsyncGenerator[Cluster, None]:
    """Own a cluster while the body, which runs in asyncio, does."""
    cluster = Cluster(**options)
    loop = asyncio.get_running_loop()
    # Not the loop's own threads: those may all wait for this cluster. `start` may hold one.
    threads = ThreadPoolExecutor(2, "rbee-cluster")
    try:
        await loop.run_in_executor(threads, cluster.start)
        yield cluster
    finally:
        closing = loop.run_in_executor(threads, cluster.close)
        threads.shutdown(wait=False)
        await _until_done(closing)


async def _until_done(closing: asyncio.Future[None]) -> None:
    """Wait for the end, which the budgets bound: a cancelled task must not leave before it."""
    cancelled: asyncio.CancelledError | None = None
    while not closing.done():
        try:
            await asyncio.wait([closing])
        except asyncio.CancelledError as exc:
            cancelled = exc
    closing.result()
    if cancelled is not None:
        raise cancelled
