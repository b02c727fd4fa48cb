"""Part ``share``: two workers on one card, what does not fit, and one worker on two cards."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import trio
from gpu_card import MIB, Card, open_card, until_back
from gpu_record import Bench, Figure
from gpu_start import stop_all
from gpu_subject import Subject, error_of, first_token
from startup import Cluster, GaveUpError, open_cluster

from rbee.testing.processes import title_of
from rbee.testing.tiny_model import write_tiny_model

SHARES = ("0.30", "0.25")
TOO_MUCH = 4 << 40  # bytes of KV cache


async def share(bench: Bench, subject: Subject, card: Card) -> None:
    figures: dict[str, Any] = {
        "two workers on one card": two_workers,
        "507 for a KV cache": no_room,
        "tensor parallel on 0,1": tensor_parallel,
    }
    if not subject.is_real or not any(map(bench.wants, figures)):
        return
    async with open_cluster() as cluster:
        baseline = card.used()
        for name, figure in figures.items():
            if bench.wants(name):
                measure = partial(figure, cluster, subject, card, baseline)
                await bench.measure(name, 200, measure, cluster.home.logs)
            with trio.move_on_after(30):
                await stop_all(cluster)


async def two_workers(cluster: Cluster, subject: Subject, card: Any, baseline: int) -> Figure:
    bodies = [subject.task(**{"gpu-memory-utilization": part}) for part in SHARES]
    seconds = [await first_token(cluster.client, body) for body in bodies]
    both: list[float] = []

    async def ask(body: dict[str, Any]) -> None:
        both.append(await first_token(cluster.client, body))

    async with trio.open_nursery() as nursery:
        for body in bodies:
            nursery.start_soon(ask, body)
    workers = [one for one in await cluster.workers() if one["state"] == "ready"]
    if len(workers) != len(SHARES):
        raise GaveUpError(f"there are {len(workers)} workers: {workers}")
    detail = card.detail()
    taken = {f"{title_of(one.pid)} [{one.pid}]": (one.used or 0) // MIB for one in detail.processes}
    used = card.used() - baseline
    await stop_all(cluster)
    back, left = await until_back(card, baseline, 10)
    return {
        "asked": SHARES, "first_token_s": seconds, "first_token_both_at_once_s": both,
        "used_share": used / detail.total, "processes_mib": taken,
        "back_after_stop_s": back, "bytes_left": left,
    }  # fmt: skip


async def no_room(cluster: Cluster, subject: Subject, card: Card, baseline: int) -> Figure:
    """Ask for more than there is: the refusal tells what was needed and what there was."""
    body = subject.task() | {"kv_cache_bytes": TOO_MUCH}
    headers = {"accept": "text/event-stream"}
    async with cluster.client.stream("POST", "/v2/tasks", json=body, headers=headers) as response:
        text = (await response.aread()).decode()
    error = error_of(text)
    details = error.get("details") or {}
    if error["code"] != "insufficient_memory" or not {"required", "available"} <= set(details):
        raise GaveUpError(f"not a 507 that tells what there was: {response.status_code} {text}")
    return {"code": error["code"], "message": error["message"], "hint": error["hint"]} | details


async def tensor_parallel(cluster: Cluster, subject: Subject, card: Card, baseline: int) -> Figure:
    """Run one worker on two cards: a tiny model, as the 9 heads of SmolLM2 cannot be shared."""
    if card.facts()["cards"] < 2:
        return {"skipped": "this machine has one card"}
    with open_card(subject.backend, 1) as other, TemporaryDirectory() as directory:
        before = other.used()
        model = str(write_tiny_model(Path(directory)))
        body = attrs.evolve(subject, model=model, device="0,1").task()
        seconds = await first_token(cluster.client, body)
        used = [(card.used() - baseline) // MIB, (other.used() - before) // MIB]
        await stop_all(cluster)
        back = [await until_back(card, baseline, 10), await until_back(other, before, 10)]
    return {
        "seconds": seconds, "used_mib": used, "back_after_stop_s": [one for one, _ in back],
        "bytes_left": sum(left for _, left in back),
    }  # fmt: skip
