"""What the queen's data plane costs: CPU per token and per request, and how late each token comes.

    python benchmarks/relay.py [--rounds N] [--only NAME,…] [--loads NAME,…] [--tools DIR] >it.json

A worker and clients in C (benchmarks/relay/, built with cc) leave the relay as the only thing that
takes time. All relays run at once in front of one worker, and each load goes to one after the
other, in another order each round, so that what else the machine does meets them alike.

``queen``       its routes with door, ids, assignments, front and pump, a registry filled by hand
``tasks``       the same asked for /v2/tasks
``ssh``         the first, its worker behind a real sshd: a node with ``transport = "ssh"``
``hypercorn``   the first without the front, as a client gets it who has begun with a control route
``httpx``       hypercorn, with httpx as the client of the workers
``vllm-router`` of PyPI, as it is, and as ``round-robin`` without its look at each prompt
``litellm``     of PyPI, one process, without a database
``nginx``       of Debian, one process, without buffering
``direct``      no relay: what is added is more than this

vllm-router and LiteLLM are installed below ``--tools``, once (a temporary directory otherwise);
what cannot be had is left out, with the reason. CPU is that of the relay's processes (ssh: without
sshd); that of a token is taken while all streams run. For ``one core`` a relay is bound to a core
that it shares with nobody of ours, and offered more than it can do. The medians of all rounds go
to stdout as JSON, with every sample, and to stderr as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from relays import (
    CHAT,
    TOKEN,
    NotHereError,
    free_port,
    litellm,
    nginx,
    round_robin,
    router,
    target_of,
)

from rbee.testing.hosts import open_hosts_sync
from rbee.wire import messages

HERE = Path(__file__).parent
STARTS = 120.0  # seconds for another relay
OURS = ("queen", "tasks", "ssh", "hypercorn", "httpx")
OTHERS: dict[str, Callable[[Path, Path, int, int], list[str]]] = {
    "vllm-router": router, "round-robin": round_robin, "litellm": litellm, "nginx": nginx,
}  # fmt: skip
NAMES = (*OURS, *OTHERS, "direct")
ENDING = (signal.SIGINT, signal.SIGTERM)
PAUSE = 0.3  # seconds in which what a load has left behind ends


@attrs.frozen
class Load:
    """One way to ask: the arguments of the load program.

    Attributes:
        without: who is not asked so, for it would take minutes or says nothing.
    """

    name: str
    clients: int
    requests: int
    streams: bool
    rate: float = 0
    tokens: int = 1
    ramp: float = 0.0
    seconds: float = 30.0
    without: tuple[str, ...] = ()

    def arguments(self, port: int, path: str) -> list[str]:
        values = (
            port, path, self.clients, self.requests, self.seconds, int(self.streams), self.rate,
            self.tokens, self.ramp,
        )  # fmt: skip
        return [str(value) for value in values]


SLOW = ("litellm", "httpx", "hypercorn")
LOADS = (
    Load("64 x 30/s", 64, 1, True, 30, 90, 0.5),
    Load("512 x 20/s", 512, 1, True, 20, 70, 1.0, without=("litellm",)),
    Load("short", 4, 300, False, without=("tasks",)),
    Load("one core", 512, 1, True, 120, 240, 0.5, without=(*SLOW, "ssh", "direct")),
    Load("4000 open", 4000, 1, True, 0.25, 3, 5.0, 60.0, without=(*SLOW, "ssh", "direct")),
)


# the relays -----------------------------------------------------------------------------------
@attrs.frozen
class Relay:
    """One that is measured; ``base`` is what it had in memory before its first load."""

    name: str
    port: int
    pid: int
    path: str = CHAT
    base: int = attrs.field(init=False)

    @base.default
    def _look(self) -> int:
        return self.memory()

    def cpu(self) -> float:
        """Return the CPU seconds of its processes, all threads."""
        return sum(map(_cpu, _tree(self.pid)))

    def memory(self) -> int:
        """Return the bytes that its processes have in memory."""
        return sum(map(_resident, _tree(self.pid)))

    @contextmanager
    def bound(self, cores: Iterable[int]) -> Iterator[None]:
        """Let it run on these cores only."""
        before = os.sched_getaffinity(self.pid)
        self._bind(cores)
        try:
            yield
        finally:
            self._bind(before)

    def _bind(self, cores: Iterable[int]) -> None:
        for pid in _tree(self.pid):
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), cores)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _tree(int(child))


def _cpu(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@contextmanager
def running(argv: Sequence[str], stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """Run a program; what it says goes nowhere, or to who reads its first line."""
    # LiteLLM would ask the net for prices.
    litellm = {"LITELLM_MASTER_KEY": TOKEN, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment = {**os.environ, **litellm, "TOKEN": TOKEN}
    with subprocess.Popen(
        argv, stdout=stdout, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def relays(worker: int, names: Iterable[str], place: Path, tools: Path) -> Iterator[list[Relay]]:
    """Run relays in front of one worker."""
    with ExitStack() as stack:
        found = []
        for name in names:
            try:
                start = _run_ours if name in OURS else _run_other
                found.append(start(stack, name, worker, place, tools))
            except NotHereError as why:
                show(f"without {name}: {why}")
        yield found


def _run_ours(stack: ExitStack, name: str, worker: int, place: Path, tools: Path) -> Relay:
    argv = [sys.executable, str(HERE / "relays.py"), name, str(worker)]
    if name == "ssh":
        argv.append(target_of(stack.enter_context(open_hosts_sync("node", namespaces=False))))
    process = stack.enter_context(running(argv))
    assert process.stdout is not None
    path = messages.TASKS if name == "tasks" else CHAT
    return Relay(name, int(process.stdout.readline()), process.pid, path)


def _run_other(stack: ExitStack, name: str, worker: int, place: Path, tools: Path) -> Relay:
    port = free_port()
    process = stack.enter_context(
        running(OTHERS[name](place, tools, port, worker), subprocess.DEVNULL)
    )
    wait_listening(port, process)
    return Relay(name, port, process.pid)


def wait_listening(port: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + STARTS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError as exc:
            if process.poll() is not None or time.monotonic() > until:
                raise NotHereError(f"{process.args!r} does not listen") from exc
            time.sleep(0.1)


# measuring ------------------------------------------------------------------------------------
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


@attrs.frozen
class Seen:
    """How a relay stood while a load ran."""

    time: float
    tokens: int
    cpu: float
    memory: int


def show(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def measure(relay: Relay, load: Load, program: Path, figures: Figures) -> None:
    """Run a load against a relay and note what it took."""
    note, before = partial(figures.add, relay.name), relay.cpu()
    with ExitStack() as stack:
        cores = sorted(os.sched_getaffinity(0))
        if load.name == "one core" and len(cores) > 1:
            stack.enter_context(relay.bound(cores[:1]))
        seen, result = run_load(relay, load, program)
    spent = relay.cpu() - before
    failed = result["errors"] + result["not_ok"]
    lost = load.clients * load.requests - result["completed"]
    if failed or lost:
        show(f"{relay.name}, {load.name}: {result}")
    if load.name == "4000 open":
        note(f"{load.name}: failed", failed + lost)
        most = max(one.memory for one in seen)
        note(f"{load.name}: kB each", (most - relay.base) / load.clients / 1000)
    elif load.name == "one core":
        note(f"{load.name}: tokens/s", rate_of(seen))
    elif relay.name != "direct" and load.streams:
        note(f"{load.name}: CPU us/token", per_token(seen))
    elif relay.name != "direct":
        note(f"{load.name}: CPU us each", spent / result["completed"] * 1e6)
    if load.name != "one core":  # where all that counts is how much comes through
        note_lateness(load, result, note)


def note_lateness(load: Load, result: Any, note: Callable[[str, float], None]) -> None:
    note(f"{load.name}: first ms p50", result["first"]["p50"] / 1000)
    note(f"{load.name}: first ms p99", result["first"]["p99"] / 1000)
    if load.tokens > 2:
        note(f"{load.name}: delay ms p50", result["delay"]["p50"] / 1000)
        note(f"{load.name}: delay ms p99", result["delay"]["p99"] / 1000)


def look(relay: Relay, tokens: int) -> Seen:
    return Seen(time.monotonic(), tokens, relay.cpu(), relay.memory())


def run_load(relay: Relay, load: Load, program: Path) -> tuple[list[Seen], Any]:
    """Run the load program to its end; return what was seen meanwhile and what it tells."""
    seen: list[Seen] = []
    with running([str(program), *load.arguments(relay.port, relay.path)]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                result = json.loads(line)
            else:
                seen.append(look(relay, int(line)))
    time.sleep(PAUSE)
    return seen, result


def middle(seen: Sequence[Seen]) -> tuple[Seen, Seen]:
    """Return the begin and the end of the time in which all streams run."""
    return seen[len(seen) * 3 // 10], seen[len(seen) * 8 // 10]


def per_token(seen: Sequence[Seen]) -> float:
    """Return the CPU microseconds of one token while all streams run."""
    begin, end = middle(seen)
    return (end.cpu - begin.cpu) / max(end.tokens - begin.tokens, 1) * 1e6


def rate_of(seen: Sequence[Seen]) -> float:
    begin, end = middle(seen)
    return (end.tokens - begin.tokens) / (end.time - begin.time)


def build(directory: Path) -> Callable[[str], Path]:
    """Compile the worker and the load."""
    for name in ("worker", "load"):
        source = str(HERE / "relay" / f"{name}.c")
        subprocess.run(["cc", "-O2", "-o", str(directory / name), source], check=True)
    return lambda name: directory / name


def table(medians: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for found in medians.values() for name in found))
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{relay:>12}" for relay in medians)]
    for name in names:
        cells = [found.get(name) for found in medians.values()]
        lines.append(f"{name:{width}}" + "".join(f"{cell_of(cell):>12}" for cell in cells))
    return "\n".join(lines)


def cell_of(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.2f}"


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "at": time.strftime("%Y-%m-%d %H:%M"), "cpu": models[:1], "cores": len(models),
        "kernel": platform.release(), "python": platform.python_version(),
        "load": os.getloadavg(),
    }  # fmt: skip


def chosen(text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")] if text else []
    if unknown := set(names) - set(known):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return [name for name in known if not names or name in names]


def end(number: int, _: object) -> None:
    """Leave by an exception, once, so that all that runs is ended on the way."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> None:
    for each in ENDING:
        signal.signal(each, end)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help=f"some of {', '.join(NAMES)}")
    loads = [load.name for load in LOADS]
    parser.add_argument("--loads", default="", help=f"some of {', '.join(loads)}")
    parser.add_argument("--tools", type=Path, help="where others are installed, and stay")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    names = chosen(options.only, NAMES)
    asked = [load for load in LOADS if load.name in chosen(options.loads, loads)]
    figures, begun = Figures(), machine()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        program, port = build(place), free_port()
        with running([str(program("worker")), str(port)], subprocess.DEVNULL) as worker:
            others = [name for name in names if name != "direct"]
            with relays(port, others, place, options.tools or place / "tools") as measured:
                if "direct" in names:
                    measured.append(Relay("direct", port, worker.pid))
                for number in range(options.rounds):
                    run_round(measured if number % 2 else measured[::-1], asked, program, figures)
                    show(f"round {number + 1} of {options.rounds}")
    medians = {name: found for name in NAMES if (found := figures.medians().get(name))}
    show(table(medians))
    machines = {"begin": begun, "end": machine()}
    print(json.dumps({"machine": machines, "medians": medians, "samples": figures.samples}))


def run_round(
    measured: Sequence[Relay], loads: Sequence[Load], program: Callable[[str], Path],
    figures: Figures,
) -> None:  # fmt: skip
    for load in loads:
        for relay in measured:
            if relay.name not in load.without:
                measure(relay, load, program("load"), figures)


if __name__ == "__main__":
    main()
