"""``python -m rbee.testing.longrun``: does a hive grow while its workers come and go?

One hive behind its two guards starts and stops a worker, again and again. Whenever none runs, its
processes are looked at: file descriptors, threads, memory, and what is in the run directory. A line
is fitted to the second half of what was seen, when all is warm: if it rises by more than a measure
may, something is kept of every worker.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import trio

from rbee.errors import PeerError, from_wire
from rbee.guard import children
from rbee.home import Home, open_home
from rbee.keeper.root import first_error
from rbee.log_files import KEPT
from rbee.model import LOCALHOST, Grace
from rbee.process import open_daemon, own_environment
from rbee.testing.cluster import hear_interrupts
from rbee.testing.processes import LeakCheck, Tree, title_of
from rbee.web.client import call, open_client, open_events
from rbee.wire import codec, messages
from rbee.wire.messages import DaemonStart, StartWorker, WorkerInfo

MIB = 1 << 20
READY = 180.0  # seconds for a worker
SAMPLES = 100  # at most
LEAST = 6  # samples below which nothing can be said
# What a measure may rise by over the second half, and by which part of itself, whichever is more.
# Threads of a pool come and go, and allocators keep a little. Proportional memory also rises when a
# neighbour on the machine ends who had the same libraries mapped.
MAY_RISE = {
    "fds": (1.5, 0.0), "threads": (2.5, 0.0), "rss": (2 * MIB, 0.02), "pss": (8 * MIB, 0.05),
    "paths": (0.5, 0.0), "journal": (2048.0, 0.0), "logs": (2.5, 0.0),
}  # fmt: skip
PROCESSES = ("guard A", "guard B", "hive", "zygote")

Sample = Mapping[str, float]
"""One look: cycle and the measures, those of a process as ``hive pss``."""


# looking ------------------------------------------------------------------------------------------
def look_at(pid: int) -> dict[str, float]:
    """Return the measures of a process; memory in bytes."""
    proc = Path(f"/proc/{pid}")
    memory = (proc / "smaps_rollup").read_text()
    return {
        "fds": len(os.listdir(proc / "fd")),
        "threads": len(os.listdir(proc / "task")),
        "rss": _kib(memory, "Rss") * 1024,
        "pss": _kib(memory, "Pss") * 1024,
    }


def _kib(text: str, name: str) -> int:
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:"))


def look_into(home: Home) -> dict[str, float]:
    """Return the measures of what is on the disk."""
    paths = list(home.run.rglob("*"))
    records = [path for path in paths if path.match("guard-*.json")]
    logs = max(0, len(list(home.logs.glob("worker-*"))) - KEPT)  # those are meant to stay
    return {"paths": len(paths), "journal": sum(map(_size, records)), "logs": logs}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # just being written anew
        return 0


def places(guard: int) -> Iterator[tuple[str, int]]:
    """Yield the processes of a hive, from its outer guard on, as far as they are there."""
    pid = guard
    for name in PROCESSES:
        yield name, pid
        title = "rbee-zygote" if name == "hive" else ""
        pid = next((one for one in children(pid) if title in title_of(one)), 0)
        if not pid:
            return


# judging ------------------------------------------------------------------------------------------
@attrs.frozen
class Trend:
    """How one measure went.

    Attributes:
        rise: of a line fitted to the second half, over that half.
        bound: what it may be.
    """

    name: str
    first: float
    middle: float
    last: float
    rise: float
    bound: float

    @property
    def grows(self) -> bool:
        return self.rise > self.bound


def trends(samples: Sequence[Sample]) -> list[Trend]:
    """Judge every measure that all samples of the second half have."""
    half = samples[len(samples) // 2 :]
    names = [name for name in half[-1] if name != "cycle" and all(name in one for one in half)]
    return [_trend(name, samples, half) for name in names]


def _trend(name: str, samples: Sequence[Sample], half: Sequence[Sample]) -> Trend:
    values = [one[name] for one in half]
    cycles = [one["cycle"] for one in half]
    least, part = MAY_RISE[name.split()[-1]]
    bound = max(least, part * sum(values) / len(values))
    rise = slope(cycles, values) * (cycles[-1] - cycles[0])
    first = next(one[name] for one in samples if name in one)
    return Trend(name, first, values[0], values[-1], rise, bound)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the slope of the line that fits best; 0 for one point."""
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    along = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return along / spread if spread else 0.0


# running ------------------------------------------------------------------------------------------
@attrs.define(eq=False)
class LongRun:
    """One hive and its workers, one after the other.

    Attributes:
        samples: what was seen, ``seconds`` what the cycles took.
    """

    home: Home
    guard: int
    client: httpx.AsyncClient
    request: StartWorker
    samples: list[Sample] = attrs.field(factory=list)
    seconds: list[float] = attrs.field(factory=list)

    async def cycle(self) -> None:
        """Start a worker, wait until it is ready, stop it.

        Raises:
            RbeeError: it did not become ready, or not all of it ended.
        """
        began = time.monotonic()
        what, path = "hive", messages.HIVE_WORKERS
        info = await call(self.client, "POST", path, WorkerInfo, self.request, what=what)
        with trio.fail_after(READY):
            await self._until_ready(info.worker_id)
        there = f"{path}/{info.worker_id}"
        await call(self.client, "DELETE", there, type(None), what=what, limit=20)
        self.seconds.append(time.monotonic() - began)

    async def _until_ready(self, worker_id: str) -> None:
        path = messages.HIVE_WORKERS
        async with open_events(self.client, "GET", path, what="hive") as events:
            async for name, data in events:
                if name == "workerids" and worker_id not in data:
                    raise PeerError(f"{worker_id} has ended before it was ready")
                if name == "workerinfo":
                    info = codec.loads(data, WorkerInfo)
                    if info.worker_id == worker_id and _is_ready(info):
                        return

    def look(self, cycle: int) -> Sample:
        found: dict[str, float] = {"cycle": cycle}
        for name, pid in places(self.guard):
            found |= {f"{name} {what}": value for what, value in look_at(pid).items()}
        sample = found | look_into(self.home)
        self.samples.append(sample)
        return sample


def _is_ready(info: WorkerInfo) -> bool:
    if info.error is not None:
        raise from_wire(info.error.code, info.error.message, details=info.error.details)
    return info.state == "ready"


@asynccontextmanager
async def open_run(request: StartWorker) -> AsyncGenerator[LongRun, None]:
    """Own a hive in a home of its own; nothing is left of it afterwards."""
    base = Path(tempfile.mkdtemp(prefix="rbee-l-", dir="/tmp"))
    home = open_home(base / "home", {"XDG_RUNTIME_DIR": str(base)})
    nonce, grace = secrets.token_hex(8), Grace()
    argv = [
        sys.executable, "-m", "rbee.hive", "daemon", "--owned", "--node", LOCALHOST,
        "--home", str(home.root), "--port", "0", "--worker-port", "0",
    ]  # fmt: skip
    start = DaemonStart("longrun", secrets.token_hex(24), str(home.run / "h1"))
    env = own_environment(home.root, nonce) | {"XDG_RUNTIME_DIR": str(base)}
    try:
        with Tree() as tree:
            check = LeakCheck(home=home, nonce=nonce, tree=tree, venv=None)
            async with open_daemon(
                argv, start, graces=[grace.guard_a, grace.guard_b], log_file=home.log_file("hive"),
                env=env, adopt_grace=grace.worker_guard + 1,
            ) as daemon, open_client(daemon.hello.url, start.token) as client:  # fmt: skip
                yield LongRun(home, daemon.process.pid, client, request)
            await check.wait_clean(2)
    finally:
        shutil.rmtree(base, ignore_errors=True)


async def run(request: StartWorker, cycles: int, tell: Any = lambda run, sample: None) -> LongRun:
    """Run so many cycles; ``tell`` is called with each sample."""
    every = max(1, cycles // SAMPLES)
    async with open_run(request) as longrun:
        for number in range(1, cycles + 1):
            await longrun.cycle()
            if number % every == 0:
                tell(longrun, longrun.look(number))
    return longrun


# telling ------------------------------------------------------------------------------------------
def table(found: Sequence[Trend]) -> str:
    rows = [["measure", "first", "middle", "last", "rise", "may rise", ""]]
    for one in found:
        values = (one.first, one.middle, one.last, one.rise, one.bound)
        cells = [_in_words(one.name, value) for value in values]
        rows.append([one.name, *cells, "GROWS" if one.grows else ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _in_words(name: str, value: float) -> str:
    if name.endswith(("rss", "pss")):
        return f"{value / MIB:.2f} MiB"
    return f"{value:.1f}".removesuffix(".0")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m rbee.testing.longrun")
    parser.add_argument("--engine", choices=["echo", "vllm"], default="echo")
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the samples to this file")
    options = parser.parse_args()
    if options.cycles < LEAST:
        parser.error(f"--cycles must be at least {LEAST}")
    hear_interrupts()
    with tempfile.TemporaryDirectory(prefix="rbee-tiny-") as directory:
        request = _request(options.engine, Path(directory))
        try:
            longrun = trio.run(run, request, options.cycles, _tell)
        except BaseExceptionGroup as group:
            error = first_error(group)
            if error is None:
                raise
            sys.stderr.write(f"error: {error}\n")
            return 1
    return _report(longrun, options.json)


def _request(engine: str, directory: Path) -> StartWorker:
    if engine == "echo":
        return StartWorker("echo", engine="echo", keep_alive=-1)
    from rbee.testing.tiny_model import write_tiny_model

    model = write_tiny_model(directory / "tiny")
    return StartWorker(model.as_uri(), engine="vllm", keep_alive=-1)


def _tell(longrun: LongRun, sample: Sample) -> None:
    hive, zygote = (sample.get(f"{name} pss", 0) / MIB for name in ("hive", "zygote"))
    sys.stderr.write(
        f"{sample['cycle']:6.0f}  {longrun.seconds[-1]:5.2f} s  hive {hive:.1f} MiB, "
        f"{sample['hive fds']:.0f} fds  zygote {zygote:.1f} MiB, {sample['paths']:.0f} paths\n"
    )


def _report(longrun: LongRun, path: Path | None) -> int:
    found = trends(longrun.samples)
    mean = sum(longrun.seconds) / len(longrun.seconds)
    sys.stdout.write(f"{table(found)}\n{len(longrun.seconds)} cycles of {mean:.2f} s\n")
    if path:
        path.write_text(json.dumps({"seconds": longrun.seconds, "samples": longrun.samples}))
    grows = [one.name for one in found if one.grows]
    sys.stdout.write(f"grows: {', '.join(grows)}\n" if grows else "nothing grows\n")
    return 1 if grows else 0


if __name__ == "__main__":
    sys.exit(main())
