"""What a queen still does when twice as much comes as its worker can do, and how fast it refuses.

    python benchmarks/overload.py [--times 2] [--seconds 20] [--slots 32] [--waiting 32] >f.json

A worker in C (benchmarks/relay/worker.c, built with cc) answers each request in a time that is
known, so slots divided by that time is what it can do. Requests come at random moments, whether
earlier ones are answered or not. Two bounds are measured: ``head``, which is decided before the
body is read, and ``model``, which needs the body. Goodput is the share of what the worker can do
that was completely answered, in twice the time at most that a full queue takes. Times of refusals
are from the first byte sent to the last one read, with all that this client itself costs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import trio

from rbee.errors import UnavailableError
from rbee.queen.aliases import Aliases
from rbee.queen.assignments import Assignments
from rbee.queen.limits import Limits
from rbee.queen.offer import Offer
from rbee.queen.openai import Passages, add_openai_routes
from rbee.registry import Registry
from rbee.web.front import Front
from rbee.web.listener import open_listener
from rbee.web.poller import open_poller
from rbee.web.pump import open_pump
from rbee.web.router import App
from rbee.web.server import serve_http
from rbee.web.upstream import open_upstreams
from rbee.wire.messages import WorkerInfo

SOURCE = Path(__file__).parent / "relay" / "worker.c"
TOKEN = "benchmark"
RATE, TOKENS = 100, 41  # tokens a second and of an answer: the first comes at once
TAKES = (TOKENS - 1) / RATE  # seconds of an answer
WARM = 2.0  # seconds that are not counted
BOUNDS = ("head", "model")


# the queen ------------------------------------------------------------------------------------
@attrs.define(eq=False)
class OneHive:
    """What the queen's routes see of a hive whose one worker is ready."""

    token: str = TOKEN
    queen_id: str = "queen"
    workers: Registry[str, WorkerInfo] = attrs.field(factory=Registry)
    failures: dict[str, WorkerInfo] = attrs.field(factory=dict)

    def running(self, node: str) -> OneHive:
        return self

    def way_to(self, url: str) -> str:
        return url

    @contextmanager
    def relaying(self) -> Iterator[trio.CancelScope]:
        with trio.CancelScope() as scope:
            yield scope


async def serve(worker: int, slots: int, limits: Limits) -> None:
    """Be a queen's data plane, and print the port of it."""
    hive: Any = OneHive()
    url = f"http://127.0.0.1:{worker}"
    info = WorkerInfo("w", "words", "ready", url=url, owner="queen", engine="echo", slots=slots)
    hive.workers.set("w", info)
    aliases, unneeded = Aliases(Path("/nowhere/config.toml")), None
    assignments = Assignments(hive, unneeded, aliases, limits)  # type: ignore[arg-type]
    app = App(token=TOKEN, gate=assignments.room.reading)
    listener = open_listener("127.0.0.1", 0, exact=True)
    async with AsyncExitStack() as stack:
        poller = await stack.enter_async_context(open_poller())
        pump = await stack.enter_async_context(open_pump(poller, 30))
        upstreams = await stack.enter_async_context(open_upstreams(poller))
        offer = Offer(aliases, unneeded)  # type: ignore[arg-type]
        passages = Passages(
            assignments, aliases, offer, upstreams, lambda: UnavailableError("it ends")
        )
        await stack.enter_async_context(passages.open())
        await stack.enter_async_context(assignments.open())
        add_openai_routes(app, passages)
        print(listener.getsockname()[1], flush=True)
        await serve_http(app, listener, front=Front(app, pump))


# the clients ----------------------------------------------------------------------------------
def request() -> bytes:
    content = f"rate={RATE} tokens={TOKENS}"
    asked = {
        "model": "words", "stream": True, "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
    body = json.dumps(asked).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@attrs.define
class Seen:
    """What came of the requests; seconds."""

    completed: list[float] = attrs.field(factory=list)
    firsts: list[float] = attrs.field(factory=list)
    refused: list[float] = attrs.field(factory=list)
    unpolite: int = 0
    other: int = 0
    late: int = 0


@attrs.define(eq=False)
class Clients:
    """Open as many connections as are needed at once, and use them again."""

    port: int
    patience: float
    seen: Seen = attrs.field(factory=Seen)
    counts: bool = False
    _idle: list[trio.SocketStream] = attrs.field(factory=list)
    _request: bytes = attrs.field(factory=request)

    async def ask(self) -> None:
        stream = (
            self._idle.pop() if self._idle else await trio.open_tcp_stream("127.0.0.1", self.port)
        )
        try:
            if await self._ask_on(stream):
                self._idle.append(stream)
                return
        except trio.BrokenResourceError:
            self.seen.other += 1
        await trio.aclose_forcefully(stream)

    async def _ask_on(self, stream: trio.SocketStream) -> bool:
        began, counts = trio.current_time(), self.counts
        await stream.send_all(self._request)
        data = await stream.receive_some()
        first = trio.current_time() - began
        is_answer = data.startswith(b"HTTP/1.1 200")
        while not data.endswith(b"0\r\n\r\n" if is_answer else b"}"):
            more = await stream.receive_some()
            if not more:
                self.seen.other += 1
                return False
            data = data[-64:] + more if is_answer else data + more
        if counts:
            self._note(data, is_answer, first, trio.current_time() - began)
        return b"connection: close" not in data

    def _note(self, data: bytes, is_answer: bool, first: float, took: float) -> None:
        if is_answer and took > self.patience:
            self.seen.late += 1
        elif is_answer:
            self.seen.completed.append(took)
            self.seen.firsts.append(first)
        elif data.startswith(b"HTTP/1.1 429"):
            self.seen.refused.append(took)
            self.seen.unpolite += b"retry-after: " not in data or b"rate_limit_error" not in data
        else:
            self.seen.other += 1

    async def flood(self, rate: float, seconds: float) -> None:
        """Send ``rate`` requests a second, and count those of the time after `WARM`."""
        due = trio.current_time()
        end, begin = due + WARM + seconds, due + WARM
        async with trio.open_nursery() as nursery:
            while due < end:
                due += random.expovariate(rate)
                await trio.sleep_until(due)
                self.counts = due > begin
                nursery.start_soon(self.ask)


# measuring ------------------------------------------------------------------------------------
@contextmanager
def running(argv: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def free_port() -> int:
    with nullcontext(open_listener("127.0.0.1", 0, exact=True)) as listener:
        port = int(listener.getsockname()[1])
        listener.close()
        return port


def measure(bound: str, worker: int, options: argparse.Namespace) -> dict[str, float]:
    most = [options.waiting, 10**6] if bound == "head" else [10**6, options.waiting]
    argv = [sys.executable, __file__, "--serve", str(worker), "--slots", str(options.slots)]
    capacity = options.slots / TAKES
    patience = 2 * (TAKES + options.waiting / capacity)
    with running([*argv, "--bounds", *map(str, most)]) as queen:
        assert queen.stdout is not None
        clients = Clients(int(queen.stdout.readline()), patience)
        trio.run(clients.flood, options.times * capacity, options.seconds)
    seen = clients.seen
    return {
        "offered/s": options.times * capacity,
        "capacity/s": capacity,
        "goodput": len(seen.completed) / options.seconds / capacity,
        "refused": len(seen.refused),
        "refused p50 ms": quantile(seen.refused, 50) * 1e3,
        "refused p99 ms": quantile(seen.refused, 99) * 1e3,
        "first p50 ms": quantile(seen.firsts, 50) * 1e3,
        "first p99 ms": quantile(seen.firsts, 99) * 1e3,
        "late": seen.late,
        "unpolite": seen.unpolite,
        "other": seen.other,
    }


def quantile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1] if len(values) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--times", type=float, default=2, help="of what the worker can do")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--waiting", type=int, default=32)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bounds", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        trio.run(serve, options.serve, options.slots, Limits(None, *options.bounds))
        return
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        program = f"{place}/worker"
        subprocess.run(["cc", "-O2", "-o", program, str(SOURCE)], check=True)
        worker = free_port()
        with running([program, str(worker)]):
            for bound in BOUNDS:
                figures[bound] = measure(bound, worker, options)
    for name in figures["head"]:
        cells = "".join(f"{figures[bound][name]:>12.2f}" for bound in BOUNDS)
        print(f"{name:16}{cells}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
