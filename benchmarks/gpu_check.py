"""Part ``check``: what is installed, what is detected, and one answer from the card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import trio
from gpu_card import MIB, Card, NvmlCard, until_back
from gpu_memory import explained, queen_there
from gpu_record import Bench, Figure
from gpu_subject import PROMPT, Subject
from startup import GaveUpError, own_home, program, wait_process

from rbee.testing.cluster import Cluster, keeper_argv, open_cluster
from rbee.testing.processes import title_of

WITHIN = 300.0


async def check(bench: Bench, subject: Subject, card: Card) -> None:
    figures = {
        "import of the engine": partial(import_engine, subject),
        "rbee-hive detect": partial(detect, card),
        "rbee-keeper infer": partial(infer, subject, card),
        "process tree": partial(look_at_tree, subject, card),
    }
    for name, figure in figures.items():
        if bench.wants(name):
            await bench.measure(name, WITHIN, figure)


async def run(argv: list[str], env: dict[str, str] | None = None) -> tuple[str, str]:
    """Run a command; return what it printed.

    Raises:
        GaveUpError: it failed.
    """
    child = subprocess.Popen(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, err = await trio.to_thread.run_sync(child.communicate, abandon_on_cancel=True)
    finally:
        child.kill()
        await wait_process(child)
    if child.returncode:
        raise GaveUpError(
            f"{' '.join(argv)} exited with {child.returncode}: {err.decode()[-1500:]}"
        )
    return out.decode(), err.decode()


async def import_engine(subject: Subject) -> Figure:
    began = time.monotonic()
    await run([sys.executable, "-m", "rbee.hive", "import", subject.engine])
    return {"seconds": time.monotonic() - began}


async def detect(card: Card) -> Figure:
    out, _ = await run([program("rbee-hive"), "detect"])
    found = json.loads(out)
    if isinstance(card, NvmlCard) and not found["gpus"]:
        raise GaveUpError(f"no GPU is detected: {out}")
    return {key: found[key] for key in ("devices", "gpus", "engines", "guarantee")}


async def infer(subject: Subject, card: Card) -> Figure:
    """Start everything for one answer; afterwards the card is as it was."""
    baseline = card.used()
    argv = [*keeper_argv("infer", subject.model, subject.workload()), *subject.flags()]
    with own_home() as (_, env, _):
        began = time.monotonic()
        answer, said = await run([*argv, "--prompt", "What is the capital of France?"], env)
        seconds = time.monotonic() - began
        back, left = await until_back(card, baseline, 10)
    return {
        "seconds": seconds, "answer": answer.strip()[:200], "back_after_its_end_s": back,
        "bytes_left": left, "said": said.splitlines()[-6:],
    }  # fmt: skip


async def look_at_tree(subject: Subject, card: Card) -> Figure:
    """Look at the processes of a worker that has answered: threads, devices, memory of the card."""
    more = subject.flags()
    async with open_cluster(subject.workload(), "idle", more=more) as cluster, explained(cluster):
        await queen_there(cluster)
        cluster.say(PROMPT)
        await cluster.until_output(1)
        pids = {name: one.pid for name, one in cluster.places()}
        taken = {}
        if isinstance(card, NvmlCard):
            taken = {one.pid: (one.used or 0) // MIB for one in card.detail().processes}
        seen = {name: _seen(pid, taken) for name, pid in pids.items() if name in LOOKED_AT}
        return {
            **seen,
            "others_on_the_card": sorted(set(taken) - set(pids.values())),
            **logs(cluster),
        }


LOOKED_AT = ("hive", "zygote", "worker", "engine")


def _seen(pid: int, taken: dict[int, int]) -> dict[str, Any]:
    names = [_name_of_thread(path) for path in Path(f"/proc/{pid}/task").iterdir()]
    links = (_link(path) for path in Path(f"/proc/{pid}/fd").iterdir())
    return {
        "pid": pid, "title": title_of(pid), "threads": len(names),
        "thread_names": sorted(set(names))[:20],
        "devices": sorted({link for link in links if link.startswith("/dev/nvidia")}),
        "mib_on_card": taken.get(pid),
    }  # fmt: skip


def _name_of_thread(path: Path) -> str:
    try:
        return (path / "comm").read_text().strip()
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115
    except OSError:
        return ""


def logs(cluster: Cluster) -> dict[str, list[str]]:
    """Return what the zygote could not do: modules that it did not load, forks that it refused."""
    assert cluster.check.home is not None
    lines = [
        line
        for log in sorted(cluster.check.home.logs.glob("*.log"))
        for line in log.read_text(errors="replace").splitlines()
        if "not preloaded" in line or "zygote" in line
    ]
    return {"zygote_says": lines[:40]}
