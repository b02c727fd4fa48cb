"""Parts ``stock`` and ``start``: seconds from the order to the first token."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from gpu_card import MIB, Card
from gpu_record import Bench, Figure, tails
from gpu_subject import Subject, first_token
from startup import Cluster, GaveUpError, open_cluster, open_stock, stock_stream

ROUNDS, STOCK_ROUNDS = 9, 3
LEFT = "bytes_left_by_the_one_before"
IMPORTED = re.compile(r"zygote \w+ imported in ([\d.]+) s")
DEVELOPER = {"VLLM_SERVER_DEV_MODE": "1"}  # vLLM shows sleep and wake_up only then


def kind(graphs: bool) -> str:
    return "graphs" if graphs else "eager"


async def stock(bench: Bench, subject: Subject, card: Card) -> None:
    """Start vLLM's own server in each way, first once: it may find its caches cold."""
    for graphs in (False, True):
        once = partial(start_stock, subject, graphs)
        if bench.wants(before := f"stock before, {kind(graphs)}"):
            await bench.measure(before, 300, once)
        if bench.wants(name := f"stock, {kind(graphs)}"):
            await bench.measure(name, 300, partial(often, STOCK_ROUNDS, once))


async def start_stock(subject: Subject, graphs: bool) -> Figure:
    async with open_stock(Path(subject.model), subject.stock_options(graphs)) as server:
        await stock_stream(server.client, 4)
        return {"seconds": time.monotonic() - server.started, "ready_s": server.ready}


async def often(
    rounds: int, once: Callable[[], Awaitable[Figure]], logs: Path | None = None
) -> Figure:
    """Return the last figure with the median of the seconds of all.

    The log of a worker that took twice as long as the median is kept with it.
    """
    figures, ends = [], []
    for _ in range(rounds):
        figures.append(await once())
        ends.append(tails(logs, 1, "worker-*.log") if logs else "")
    samples = [one["seconds"] for one in figures]
    middle = statistics.median(samples)
    slow = [end for end, sample in zip(ends, samples, strict=True) if sample > 2 * middle]
    found = {**figures[-1], "seconds": middle, "samples": samples}
    if LEFT in found:
        found[LEFT] = max(one[LEFT] for one in figures)
    return {**found, "slow": slow} if slow else found


async def start(bench: Bench, subject: Subject, card: Card) -> None:
    for graphs in (False, True):
        names = [
            f"first worker, {kind(graphs)}", f"second worker before, {kind(graphs)}",
            f"second worker, {kind(graphs)}",
        ]  # fmt: skip
        if not any(map(bench.wants, names)):
            continue
        async with open_cluster() as cluster:
            baseline = card.used()
            again = partial(order, cluster, subject, card, baseline, graphs)
            logs = cluster.home.logs
            await bench.measure(names[0], 300, partial(order_first, cluster, again), logs)
            await bench.measure(names[1], 200, again, logs)
            await bench.measure(names[2], 300, partial(often, ROUNDS, again, logs), logs)
            await stop_all(cluster)
    await sleeps(bench, subject, card)


async def order_first(cluster: Cluster, again: Any) -> Figure:
    """Order the first worker of a queen: its hive and the zygote start for it."""
    return {**await again(), "zygote_import_s": import_seconds(cluster)}


async def order(
    cluster: Cluster, subject: Subject, card: Card, baseline: int, graphs: bool
) -> Figure:
    left = await stop_all(cluster, card, baseline)
    seconds = await first_token(cluster.client, subject.task(graphs))
    return {"seconds": seconds, LEFT: left}


async def stop_all(cluster: Cluster, card: Card | None = None, baseline: int = 0) -> int:
    """Stop the workers; return the bytes that are in use when that is said to be done."""
    for worker in await cluster.workers():
        if worker["state"] == "ready":
            await cluster.stop_worker(worker["worker_id"])
    return max(0, card.used() - baseline) if card else 0


def import_seconds(cluster: Cluster) -> float | None:
    for log in cluster.home.logs.glob("hive-*.log"):
        if found := IMPORTED.findall(log.read_text(errors="replace")):
            return float(found[-1])
    return None


# sleep --------------------------------------------------------------------------------------------
async def sleeps(bench: Bench, subject: Subject, card: Card) -> None:
    names = ["wake from sleep 1", "wake from sleep 2"]
    if not subject.is_real or not any(map(bench.wants, names)):
        return
    async with open_cluster(variables=DEVELOPER) as cluster:
        baseline = card.used()
        body = subject.task(graphs=True, enable_sleep_mode="true")
        for level, name in enumerate(names, start=1):
            measure = partial(sleep_and_wake, cluster, body, card, baseline, level)
            if bench.wants(name):
                await bench.measure(name, 200, measure, cluster.home.logs)
        await stop_all(cluster)


async def sleep_and_wake(
    cluster: Cluster, body: dict[str, Any], card: Card, baseline: int, level: int
) -> Figure:
    await first_token(cluster.client, body)
    awake = card.used() - baseline
    async with open_worker(cluster) as worker:
        began = time.monotonic()
        await post(worker, f"/sleep?level={level}")
        to_sleep, asleep = time.monotonic() - began, card.used() - baseline
        began = time.monotonic()
        if level == 1:
            await post(worker, "/wake_up")
        else:  # the weights are gone
            await post(worker, "/wake_up?tags=weights")
            await post(worker, "/collective_rpc", {"method": "reload_weights"})
            await post(worker, "/wake_up?tags=kv_cache")
        await first_token(cluster.client, body)
        return {
            "seconds": time.monotonic() - began, "to_sleep_s": to_sleep,
            "awake_mib": awake // MIB, "asleep_mib": asleep // MIB,
        }  # fmt: skip


@asynccontextmanager
async def open_worker(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """Talk to the one ready worker itself."""
    (worker,) = [one for one in await cluster.workers() if one["state"] == "ready"]
    headers = {"authorization": f"Bearer {cluster.token}"}
    async with httpx.AsyncClient(
        base_url=worker["url"], headers=headers, trust_env=False, timeout=None
    ) as client:
        yield client


async def post(client: httpx.AsyncClient, path: str, body: Any = None) -> None:
    response = await client.post(path, json=body or {})
    if response.status_code != 200:
        raise GaveUpError(f"POST {path}: {response.status_code} {response.text[:500]}")
