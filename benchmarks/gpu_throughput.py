"""Part ``throughput``: many streams through the queen, and straight to the same worker."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs
import trio
from gpu_card import Card
from gpu_record import Bench, Figure
from gpu_start import stop_all
from gpu_subject import Subject, first_token
from startup import Cluster, GaveUpError, open_cluster

STREAMS = (1, 64, 256)
TOKENS = 128
ROUNDS = 20  # of about a second: a card's speed drifts by a fifth between two of them
CLIENTS = 8  # processes, so that none of them is what is measured
# Goes on for as long as it may: no answer ends before the others.
PROMPT = " ".join(str(number) for number in range(1, 60))
LOAD = Path(__file__).with_name("load.py")


@attrs.frozen
class Target:
    """Where streams are asked for: ``path`` of the queen or of the worker."""

    url: str
    path: str
    is_worker: bool
    body: dict[str, Any]


async def throughput(bench: Bench, subject: Subject, card: Card) -> None:
    names = {count: f"throughput, {count} streams" for count in STREAMS}
    if not any(map(bench.wants, names.values())):
        return
    async with open_cluster() as cluster:
        body = subject.task(graphs=True)
        logs, first = cluster.home.logs, partial(begin, cluster, body)
        if not await bench.measure("throughput, worker start", 300, first, logs):
            return
        ways = await targets(cluster, body)
        for count, name in names.items():
            if bench.wants(name):
                await bench.measure(name, 300, partial(compare, ways, cluster.token, count), logs)
        await stop_all(cluster)


async def begin(cluster: Cluster, body: dict[str, Any]) -> Figure:
    return {"seconds": await first_token(cluster.client, body)}


async def targets(cluster: Cluster, body: dict[str, Any]) -> dict[str, Target]:
    (worker,) = [one for one in await cluster.workers() if one["state"] == "ready"]
    asked = {"prompt": PROMPT, "raw": True, "max_tokens": TOKENS, "temperature": 0}
    queen = str(cluster.client.base_url)
    return {
        "queen": Target(queen, "/v2/tasks", False, body | asked),
        "direct": Target(worker["url"], "/execute", True, asked),
    }


async def compare(ways: dict[str, Target], token: str, count: int) -> Figure:
    """Measure both ways in turns, so that both see the same machine; medians count."""
    rates: dict[str, list[float]] = {way: [] for way in ways}
    firsts: dict[str, list[float]] = {way: [] for way in ways}
    turns = list(ways.items())
    for number in range(ROUNDS + 1):
        for way, target in turns if number % 2 else reversed(turns):
            rate, times = await run(target, token, count, f"{way}-{number}")
            if number:  # the first one warms up
                rates[way].append(rate)
                firsts[way] += times
    figure: Figure = {}
    for way in ways:
        figure[f"{way}_tokens_s"] = statistics.median(rates[way])
        figure[f"{way}_ttft_ms"] = percentiles(firsts[way])
    pairs = zip(rates["queen"], rates["direct"], strict=True)
    ratios = [queen / direct for queen, direct in pairs]
    return figure | {"ratio": statistics.median(ratios), "ratios": [round(r, 3) for r in ratios]}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99)}
    return {f"p{share * 100:.0f}": round(value * 1000, 1) for share, value in at.items()}


async def run(target: Target, token: str, count: int, name: str) -> tuple[float, list[float]]:
    """Stream ``count`` answers at once; return tokens/s and the times to the first token."""
    place = urlsplit(target.url)
    clients = min(CLIENTS, count)
    job = {
        "host": place.hostname, "port": place.port, "path": target.path, "token": token,
        "body": target.body, "is_worker": target.is_worker,
    }  # fmt: skip
    children = [
        open_client({**job, "name": f"{name}-{n}", "streams": count // clients})
        for n in range(clients)
    ]
    try:
        for child in children:
            await read_line(child)
        for child in children:
            write_line(child, "")
        answers = [json.loads(await read_line(child)) for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return rate_of([one for found in answers for one in found])


def rate_of(found: list[dict[str, Any]]) -> tuple[float, list[float]]:
    if failed := [one["failed"] for one in found if "failed" in one]:
        raise GaveUpError(f"{len(failed)} of {len(found)} streams failed, one with {failed[0]}")
    seconds = max(one["end"] for one in found) - min(one["began"] for one in found)
    return sum(one["tokens"] for one in found) / seconds, [one["ttft"] for one in found]


def open_client(job: dict[str, Any]) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, str(LOAD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    write_line(child, json.dumps(job))
    return child


def write_line(child: subprocess.Popen[bytes], line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(line.encode() + b"\n")
    child.stdin.flush()


async def read_line(child: subprocess.Popen[bytes]) -> bytes:
    assert child.stdout is not None
    line, fd = b"", child.stdout.fileno()
    while not line.endswith(b"\n"):
        await trio.lowlevel.wait_readable(fd)
        data = os.read(fd, 1 << 16)
        if not data:
            raise GaveUpError("a client of the load ended")
        line += data
    return line
