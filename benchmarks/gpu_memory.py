"""Part ``memory``: kill -9 of each process and of pairs, and how soon the card is empty again."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import attrs
import trio
from gpu_card import MIB, Card, until_back
from gpu_record import Bench, Figure
from gpu_subject import PROMPT, Subject
from startup import GaveUpError, open_stock, stock_stream

from rbee.guard import send_signal
from rbee.testing.cluster import Cluster, keeper_argv, open_cluster
from rbee.testing.deaths import explain
from rbee.testing.processes import Identity, Tree, is_running, read_stat, title_of

STATES = ("loading", "streaming")
# What the conversation survives, and what ends it.
PARTS = (
    ("engine",), ("worker",), ("worker", "engine"), ("zygote",), ("zygote", "worker"), ("hive",),
)  # fmt: skip
OWNERS = (("keeper",), ("queen",), ("queen", "hive"))
FIRST_BYTES = 12  # of the answer: it is streaming
WITHIN = 30.0  # seconds to wait for the memory
GONE = 3.0  # seconds more for the last process
WATCHED = 30.0  # seconds that an orphan of vLLM's own server is watched
CELL = 150.0

Victims = tuple[str, ...]


def name_of(victims: Victims, state: str) -> str:
    return f"kill {' + '.join(victims)}, {state}"


async def memory(bench: Bench, subject: Subject, card: Card) -> None:
    baseline = card.used()
    await survived(bench, subject, card, baseline)
    for victims in OWNERS:
        for state in STATES:
            strike = partial(strike_owner, subject, card, baseline, victims, state)
            if bench.wants(name_of(victims, state)):
                await bench.measure(name_of(victims, state), CELL, strike)
    name = "stock vLLM, kill API server"
    if subject.is_real and bench.wants(name):
        await bench.measure(name, 400, partial(stock_death, subject, card, baseline))


async def survived(bench: Bench, subject: Subject, card: Card, baseline: int) -> None:
    """Measure in one conversation what it survives; in a new one after a figure that failed."""
    todo = [(victims, state) for victims in PARTS for state in STATES]
    todo = [cell for cell in todo if bench.wants(name_of(*cell))]
    while todo:
        async with open_cluster(subject.workload(), "idle", more=subject.flags()) as cluster:
            await queen_there(cluster)
            assert cluster.check.home is not None
            while todo:
                victims, state = todo.pop(0)
                strike = partial(strike_part, cluster, subject, card, baseline, victims, state)
                name = name_of(victims, state)
                if not bench.wants(name):
                    continue
                if not await bench.measure(name, CELL, strike, cluster.check.home.logs):
                    break


async def queen_there(cluster: Cluster) -> None:
    assert cluster.check.home is not None
    with trio.fail_after(30):
        while not cluster.check.home.queen_file.exists():
            await trio.sleep(0.01)


# one kill ---------------------------------------------------------------------------------------
async def strike_part(
    cluster: Cluster, subject: Subject, card: Card, baseline: int, victims: Victims, state: str
) -> Figure:
    async with asking(cluster, subject) as asked:
        await reach(state, cluster, card, baseline, asked.child, lambda: asked.output)
        found = [await cluster.until_there(name) for name in victims]
        figure = await strike(found, card, baseline)
        with trio.move_on_after(20):  # it hears of it
            while asked.child.poll() is None:
                await trio.sleep(0.01)
    return figure


async def strike_owner(
    subject: Subject, card: Card, baseline: int, victims: Victims, state: str
) -> Figure:
    more = subject.flags()
    async with open_cluster(subject.workload(), state, more=more) as cluster, explained(cluster):
        cluster.say(PROMPT)
        await reach(state, cluster, card, baseline, cluster.keeper, lambda: cluster.output)
        found = [await cluster.until_there(name) for name in victims]
        figure = await strike(found, card, baseline)
        with trio.fail_after(10):
            while cluster.keeper.poll() is None:
                await trio.sleep(0.01)
        figure["clean_s"] = await cluster.check.wait_clean(10)
        return figure


@asynccontextmanager
async def explained(cluster: Cluster) -> AsyncIterator[None]:
    """Add to an error what was there: afterwards the cluster is gone."""
    try:
        yield
    except Exception as exc:
        exc.add_note(explain(cluster))
        raise


async def reach(
    state: str,
    cluster: Cluster,
    card: Card,
    baseline: int,
    child: subprocess.Popen[bytes],
    output: Callable[[], bytes],
) -> None:
    """Return when the engine holds memory and still loads, or when the answer comes."""
    while True:
        if child.poll() is not None:
            raise GaveUpError(f"the command ended with {child.returncode} before {state}")
        if state == "streaming" and len(output()) >= FIRST_BYTES:
            return
        if state == "loading" and cluster.locate("engine") and card.used() > baseline + card.mark:
            if output():
                raise GaveUpError("it answered before it was caught loading")
            return
        await trio.sleep(0.005)


async def strike(victims: Sequence[Identity], card: Card, baseline: int) -> Figure:
    """Kill, and watch the card and all that ran below."""
    held = card.used() - baseline
    with Tree(*(one.pid for one in victims)) as tree:
        for one in victims:
            send_signal(one.pid, one.start, signal.SIGKILL)
        seconds, left = await until_back(card, baseline, WITHIN)
        with trio.move_on_after(GONE):
            while tree.running():
                await trio.sleep(0.01)
        return {
            "held_mib": held // MIB, "seconds": seconds, "bytes_left": left,
            "processes_left": [title_of(one.pid) for one in tree.running()],
        }  # fmt: skip


# a command beside the conversation ----------------------------------------------------------------
@attrs.define(eq=False)
class Asked:
    """An `infer` that is answered, or not."""

    child: subprocess.Popen[bytes]
    output: bytes = b""

    async def keep_reading(self) -> None:
        assert self.child.stdout is not None
        async with trio.lowlevel.FdStream(os.dup(self.child.stdout.fileno())) as stream:
            async for data in stream:
                self.output += data


@asynccontextmanager
async def asking(cluster: Cluster, subject: Subject) -> AsyncIterator[Asked]:
    """Ask the conversation's queen with a command of its own."""
    argv = [*keeper_argv("infer", subject.model, subject.workload()), *subject.flags()]
    with TemporaryFile() as said:
        child = subprocess.Popen(
            [*argv, "--prompt", PROMPT],
            env={**cluster.environment(), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said,
        )  # fmt: skip
        asked = Asked(child)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(asked.keep_reading)
                yield asked
                nursery.cancel_scope.cancel()
        except BaseException as exc:
            exc.add_note(_tail(said))
            raise
        finally:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


def _tail(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read()[-1500:].decode(errors="replace")


# the contrast -------------------------------------------------------------------------------------
async def stock_death(subject: Subject, card: Card, baseline: int) -> Figure:
    """Kill vLLM's own API server: what stays, and whether it goes once the orphan is killed."""
    async with open_stock(Path(subject.model), subject.stock_options(graphs=False)) as server:
        await stock_stream(server.client, 1)
        with Tree(server.pid) as tree:
            held = card.used() - baseline
            front = next(one for one in tree.noted if one.pid == server.pid)
            send_signal(front.pid, front.start, signal.SIGKILL)
            await trio.sleep(WATCHED)
            figure: dict[str, Any] = {
                "held_mib": held // MIB,
                "left_mib_after_30_s": (card.used() - baseline) // MIB,
                "left_processes": [_orphan(one) for one in tree.running()],
            }
            tree.kill()
            seconds, left = await until_back(card, baseline, WITHIN)
            return figure | {"back_after_killing_them_s": seconds, "bytes_left_then": left}


def _orphan(one: Identity) -> str:
    stat = read_stat(one.pid)
    alive = "" if is_running(one) else " (gone)"
    return f"{title_of(one.pid)} (parent {stat.parent if stat else 0}){alive}"
