"""What the queen's data plane costs: CPU per token and per request, and how late each token comes.

    python benchmarks/relay.py [--rounds N] [--also 'NAME=COMMAND']… >figures.json

A worker and clients in C (benchmarks/relay/, built with cc) leave the relay as the only thing that
takes time. Measured are, in turns: ``queen``, its routes with door, assignments, front and pump
and a registry filled by hand; ``tasks``, the same asked for ``/v2/tasks``; ``hypercorn``, the first
without the front, as a client gets it who has begun with a control route; ``httpx``, hypercorn with
httpx as the client of the workers.
``--also`` names another relay and how it is started, with {port} for its own port and {worker} for
the worker's. CPU is that of the relay's processes; that of a token is taken while all streams run.
The medians go to stdout as JSON and to stderr as a table.

    --also 'vllm-router=vllm-router --port {port} --worker-urls http://127.0.0.1:{worker}'
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import httpx
import trio

from rbee.errors import UnavailableError
from rbee.queen.aliases import Aliases
from rbee.queen.assignments import Assignments
from rbee.queen.jobs import Jobs
from rbee.queen.offer import Offer
from rbee.queen.openai import Passages, add_openai_routes
from rbee.queen.tasks import add_task_routes
from rbee.registry import Registry
from rbee.web.client import open_client
from rbee.web.front import Front
from rbee.web.out import Out
from rbee.web.poller import open_poller
from rbee.web.pump import open_pump
from rbee.web.router import App, Passing, Request
from rbee.web.server import open_listener, serve_http
from rbee.web.upstream import open_upstreams
from rbee.wire import messages
from rbee.wire.messages import WorkerInfo

HERE = Path(__file__).parent / "relay"
TOKEN = "benchmark"
STARTS = 60.0  # seconds for another relay
OURS = ("queen", "tasks", "hypercorn", "httpx")
CHAT = "/v1/chat/completions"


@attrs.frozen
class Load:
    """One way to ask: the arguments of the load program, and what one unit of its work is."""

    name: str
    clients: int
    requests: int
    streams: bool
    rate: int = 0
    tokens: int = 1
    ramp: float = 0.0
    seconds: float = 30.0

    def arguments(self, port: int, path: str) -> list[str]:
        values = (
            port, path, self.clients, self.requests, self.seconds, int(self.streams), self.rate,
            self.tokens, self.ramp,
        )  # fmt: skip
        return [str(value) for value in values]


LOADS = (
    Load("64 x 30/s", 64, 1, True, 30, 120, 1.0),
    Load("512 x 20/s", 512, 1, True, 20, 100, 2.0),
    Load("short", 4, 500, False),
)


# the relays -----------------------------------------------------------------------------------
@attrs.define(eq=False)
class OneHive:
    """What the queen's routes see of a hive whose one worker is ready."""

    url: str
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


async def serve(kind: str, worker_port: int) -> None:
    """Be a relay, and print the port of it."""
    url = f"http://127.0.0.1:{worker_port}"
    app = App(token=TOKEN)
    listener = open_listener("127.0.0.1", 0, exact=True)
    async with AsyncExitStack() as stack:
        front = None
        if kind == "httpx":
            client = await stack.enter_async_context(open_client(url))
            app.add("POST", CHAT, partial(pass_by_httpx, client))
        else:
            poller = await stack.enter_async_context(open_poller())
            pump = await stack.enter_async_context(open_pump(poller, 30))
            passages = make_passages(url, await stack.enter_async_context(open_upstreams(poller)))
            await stack.enter_async_context(passages.open())
            add_openai_routes(app, passages)
            await stack.enter_async_context(open_tasks(app, passages))
            front = None if kind == "hypercorn" else Front(app, pump)
        print(listener.getsockname()[1], flush=True)
        await serve_http(app, listener, front=front)


def make_passages(url: str, upstreams: Any) -> Passages:
    hive: Any = OneHive(url)
    hive.workers.set("w", WorkerInfo("w", "words", "ready", url=url, owner="queen"))
    aliases = Aliases(Path("/nowhere/config.toml"))
    unneeded: Any = None
    assignments = Assignments(hive, unneeded, aliases)
    offer = Offer(aliases, unneeded)
    return Passages(assignments, aliases, offer, upstreams, lambda: UnavailableError("it ends"))


@asynccontextmanager
async def open_tasks(app: App, passages: Passages) -> AsyncGenerator[None, None]:
    """Add ``/v2/tasks`` to the same assignments."""
    jobs = Jobs(passages._assignments, passages._aliases, passages._upstreams, passages._ending)
    add_task_routes(app, jobs)
    async with jobs.open():
        yield


async def pass_by_httpx(client: httpx.AsyncClient, request: Request) -> Passing:
    """Pass on with httpx and ASGI, as most Python relays do."""
    body = await request.json()

    async def run(out: Out) -> None:
        headers = {"content-type": "application/json"}
        asking = client.build_request("POST", CHAT, content=body, headers=headers)
        answer = await client.send(asking, stream=True)
        try:
            kind = answer.headers["content-type"].encode()
            await out.begin(answer.status_code, ((b"content-type", kind),))
            async for data in answer.aiter_raw():
                await out.emit(data)
            await out.end()
        finally:
            await answer.aclose()

    return Passing(run)


# measuring ------------------------------------------------------------------------------------
@attrs.frozen
class Relay:
    name: str
    port: int
    pid: int
    path: str = CHAT

    def cpu(self) -> float:
        """Return the CPU seconds of its processes, all threads."""
        return sum(map(_cpu, _tree(self.pid)))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _tree(int(child))


def _cpu(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@attrs.define
class Figures:
    """Samples by relay and what was measured; medians are what counts."""

    samples: dict[str, dict[str, list[float]]] = attrs.field(factory=dict)

    def add(self, relay: str, name: str, value: float) -> None:
        self.samples.setdefault(relay, {}).setdefault(name, []).append(value)

    def medians(self) -> dict[str, dict[str, float]]:
        return {
            relay: {name: statistics.median(values) for name, values in found.items()}
            for relay, found in self.samples.items()
        }


def show(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def measure(relay: Relay, load: Load, program: Path, figures: Figures) -> None:
    """Run a load against a relay and note what it took."""
    environment = {**os.environ, "TOKEN": TOKEN}
    argv = [str(program), *load.arguments(relay.port, relay.path)]
    seen: list[tuple[int, float]] = []
    before = relay.cpu()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("{"):
                result = json.loads(line)
            else:
                seen.append((int(line), relay.cpu()))
    spent = relay.cpu() - before
    if result["errors"] or result["not_ok"] or result["completed"] != load.clients * load.requests:
        show(f"{relay.name}, {load.name}: {result}")
        figures.add(relay.name, f"{load.name}: failed", 1)
    if load.streams:
        figures.add(relay.name, f"{load.name}: us/token", per_token(seen))
        figures.add(relay.name, f"{load.name}: delay p50 us", result["delay"]["p50"])
        figures.add(relay.name, f"{load.name}: delay p99 us", result["delay"]["p99"])
    else:
        figures.add(relay.name, f"{load.name}: us/request", spent / result["completed"] * 1e6)
    figures.add(relay.name, f"{load.name}: first p50 us", result["first"]["p50"])
    figures.add(relay.name, f"{load.name}: first p99 us", result["first"]["p99"])


def per_token(seen: Sequence[tuple[int, float]]) -> float:
    """Return the CPU microseconds of one token while all streams run."""
    (begun, cpu), (until, later) = seen[len(seen) * 3 // 10], seen[len(seen) * 9 // 10]
    return (later - cpu) / max(until - begun, 1) * 1e6


def build(directory: Path) -> Callable[[str], Path]:
    """Compile the worker and the load."""
    for name in ("worker", "load"):
        source = str(HERE / f"{name}.c")
        subprocess.run(["cc", "-O2", "-o", str(directory / name), source], check=True)
    return lambda name: directory / name


@contextmanager
def running(argv: Sequence[str], stdout: Any = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(argv, stdout=stdout, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def relays(worker: int, others: Sequence[str]) -> Iterator[list[Relay]]:
    """Run all relays in front of one worker."""
    with ExitStack() as stack:
        found = []
        for kind in OURS:
            argv = [sys.executable, __file__, "--serve", kind, "--worker", str(worker)]
            process = stack.enter_context(running(argv))
            assert process.stdout is not None
            path = messages.TASKS if kind == "tasks" else CHAT
            found.append(Relay(kind, int(process.stdout.readline()), process.pid, path))
        for other in others:
            name, _, command = other.partition("=")
            port = free_port()
            argv = shlex.split(command.format(port=port, worker=worker))
            process = stack.enter_context(running(argv, stdout=sys.stderr))
            wait_listening(port)
            found.append(Relay(name, port, process.pid))
        yield found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_listening(port: int) -> None:
    until = time.monotonic() + STARTS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def table(medians: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for found in medians.values() for name in found))
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{relay:>14}" for relay in medians)]
    for name in names:
        cells = [found.get(name) for found in medians.values()]
        lines.append(f"{name:{width}}" + "".join(
            f"{'-' if cell is None else f'{cell:.0f}':>14}" for cell in cells
        ))  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--also", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--serve", choices=OURS, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        trio.run(serve, options.serve, options.worker)
        return
    figures = Figures()
    with tempfile.TemporaryDirectory() as place:
        program = build(Path(place))
        worker = free_port()
        with (
            running([str(program("worker")), str(worker)]),
            relays(worker, options.also) as measured,
        ):
            for number in range(options.rounds):
                for load in LOADS:
                    for relay in measured:
                        measure(relay, load, program("load"), figures)
                show(f"round {number + 1} of {options.rounds}")
    medians = figures.medians()
    show(table(medians))
    print(json.dumps({"medians": medians, "samples": figures.samples}))


if __name__ == "__main__":
    main()
