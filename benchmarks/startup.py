"""How long until a model answers: rbee's ways against vLLM's own server, on this machine's CPU.

    python benchmarks/startup.py [--smol DIR] [--rounds N] [PART …] >figures.json

There are two models: the tiny one of the tests, and SmolLM2-135M, taken from the catalog of this
user's home (`rbee-keeper model pull smollm2-135m`) or from a directory. Without it only the tiny
one is measured. Both sides get float32, enforce_eager and a small KV cache.

Each part runs alone; a ratio is given when both of its sides were measured in the same run. The
medians go to stdout as JSON and to stderr as a table.

stock   `python -m vllm.entrypoints.openai.api_server`: start to ready, start to the first token
zygote  second and later workers of a running queen: order to ready
cold    `rbee-keeper infer` with nothing running: start to the first token
warm    `rbee-keeper infer` on a warm worker: start to the first token, less the worker's own time,
        against `python -c "import trio, httpx, cyclopts"`
swap    `POST /v2/tasks` for A, then B, then A again, with memory for one of them: order of B to the
        last token of A, against two starts of stock vLLM
front   CPU of the process that serves, per token, at 16 streams: a worker and vLLM's own server

Everything runs in homes and directories of its own, below /tmp, and is checked to be gone.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import trio

from rbee.home import Home, find_home
from rbee.models.catalog import GGUF, list_models
from rbee.testing.processes import LeakCheck, LeakError, Tree
from rbee.testing.tiny_model import write_tiny_model

MARKER = "RBEE_BENCHMARK"
PROMPT = "What is the capital of France?"
STREAMS, TOKENS = 16, 300
START_LIMIT, STOP_LIMIT, LEFT_LIMIT = 600.0, 20.0, 5.0
KV_BYTES = 128 << 20
BROKEN = ("torchvision", "torchaudio", "torchcodec")
FRONT_BUDGET, IMPORT_BUDGET = 1.4, 1.5
READY_BUDGETS = {"tiny": 1 / 10, "smol": 1 / 5}
FIRST_TOKEN_BUDGET = 0.7
SWAP_BUDGET = 1 / 8
ROOM_FOR_ONE = "1536M"  # a tiny model is planned at 1.1 GiB


class GaveUpError(Exception):
    """What was to be measured did not work."""


# what was measured ------------------------------------------------------------------------------
@attrs.define
class Figures:
    """Samples by name; medians are what counts."""

    samples: dict[str, list[float]] = attrs.field(factory=dict)

    def add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)
        show(f"{name}: {value:.4g}")

    def median(self, name: str) -> float | None:
        return statistics.median(self.samples[name]) if self.samples.get(name) else None

    def ratios(self) -> dict[str, dict[str, float]]:
        """Return every ratio that both sides were measured of, with its budget."""
        found = {}
        for name, top, bottom, budget in RATIOS:
            over, under = self.median(top), self.median(bottom)
            if over is not None and under:
                found[name] = {"ratio": over / under, "at_most": budget}
        return found


RATIOS = [
    *(
        (f"zygote/stock ready, {m}", f"zygote {m} ready s", f"stock {m} ready s", budget)
        for m, budget in READY_BUDGETS.items()
    ),
    (
        "cold/stock first token, smol",
        "cold smol first token s",
        "stock smol first token s",
        FIRST_TOKEN_BUDGET,
    ),
    ("swap/two stock starts", "swap A to B to A s", "stock tiny twice first token s", SWAP_BUDGET),
    ("warm/import", "warm infer less ttft s", "import trio, httpx, cyclopts s", IMPORT_BUDGET),
    ("front worker/stock", "front worker us/token", "front stock us/token", FRONT_BUDGET),
]


def show(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def table(figures: Figures) -> str:
    lines = [f"{'figure':<40}{'median':>12}{'least':>12}{'most':>12}{'rounds':>8}"]
    for name, values in figures.samples.items():
        cells = (statistics.median(values), min(values), max(values))
        lines.append(f"{name:<40}" + "".join(f"{c:>12.4g}" for c in cells) + f"{len(values):>8}")
    lines.append(f"\n{'ratio':<40}{'measured':>12}{'at most':>12}")
    for name, ratio in figures.ratios().items():
        mark = "" if ratio["ratio"] <= ratio["at_most"] else "   MISSED"
        lines.append(f"{name:<40}{ratio['ratio']:>12.3g}{ratio['at_most']:>12.3g}{mark}")
    return "\n".join(lines)


# processes of the benchmark -----------------------------------------------------------------------
@contextmanager
def own_directory() -> Iterator[Path]:
    """Make a directory with a path short enough for unix sockets."""
    path = tempfile.mkdtemp(prefix="rbee-b-", dir="/tmp")
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def environment(directory: Path, marker: str) -> dict[str, str]:
    """Return the environment of a child: nobody's rbee settings, offline, compiled bytecode."""
    drop = ("RBEE_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    return kept | {
        MARKER: marker,
        "SPT_NOENV": "1",
        "TMPDIR": str(directory),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


@contextmanager
def no_leftovers(marker: str) -> Iterator[Tree]:
    """End what the body has left when it is over; say so, for the next figure would suffer."""
    with Tree() as tree:
        check = LeakCheck(nonce=marker, marker=MARKER, tree=tree)
        try:
            yield tree
        finally:
            try:
                check.wait_clean_sync(LEFT_LIMIT)
            except LeakError as error:
                show(f"ended: {error}")
                check.kill()


async def end_process(child: subprocess.Popen[Any]) -> None:
    """End a child with TERM, after a while with KILL."""
    child.send_signal(signal.SIGTERM)
    with trio.move_on_after(STOP_LIMIT, shield=True):
        await wait_process(child)
    child.kill()
    child.wait()


async def wait_process(child: subprocess.Popen[Any]) -> None:
    if child.poll() is None:
        pidfd = os.pidfd_open(child.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


async def until(ready: Callable[[], Awaitable[bool]], child: subprocess.Popen[Any]) -> None:
    """Poll until ready; stock vLLM has no other way to tell."""
    with trio.fail_after(START_LIMIT):
        while not await ready():
            if child.poll() is not None:
                raise GaveUpError(f"process {child.pid} ended with status {child.returncode}")
            await trio.sleep(0.02)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of one process with all its threads, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# stock vLLM ---------------------------------------------------------------------------------------
@attrs.frozen
class Stock:
    """vLLM's own server: ``ready`` is the seconds from its start until it was ready."""

    client: httpx.AsyncClient
    pid: int
    started: float
    ready: float


def shim(directory: Path) -> dict[str, str]:
    """Let vLLM start beside a torchvision that cannot be imported, as rbee's worker does."""
    check = (
        f"import importlib.util\nfor name in {BROKEN}:\n"
        "    if importlib.util.find_spec(name): importlib.import_module(name)"
    )
    if subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0:
        return {}
    text = f"import sys\nsys.modules.update(dict.fromkeys({BROKEN}))\n"
    (directory / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": str(directory)}


CPU_OPTIONS = (
    "--enforce-eager", "--dtype=float32", "--max-model-len=2048",
    f"--kv-cache-memory-bytes={KV_BYTES}",
)  # fmt: skip


def stock_argv(model: Path, port: int, options: Sequence[str]) -> list[str]:
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}"]
    return [*argv, "--served-model-name=m", "--host=127.0.0.1", f"--port={port}", *options]


@asynccontextmanager
async def open_stock(model: Path, options: Sequence[str] = CPU_OPTIONS) -> AsyncIterator[Stock]:
    """Run vLLM's own server from ready to the end of the body."""
    marker = secrets.token_hex(8)
    with own_directory() as directory, no_leftovers(marker) as tree:
        sockets = directory / "rpc"
        sockets.mkdir()
        env = environment(directory, marker) | shim(directory)
        env |= {"VLLM_RPC_BASE_PATH": str(sockets)}
        port, log = free_port(), directory / "log"
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=None
        ) as client:
            started = time.monotonic()
            with log.open("wb") as output:
                child = subprocess.Popen(
                    stock_argv(model, port, options), env=env, stdout=output, stderr=output
                )
            try:
                await until(lambda: answers(client), child)
                ready = time.monotonic() - started
                tree.refresh(child.pid)
                yield Stock(client, child.pid, started, ready)
            except GaveUpError:
                show(tail(log))
                raise
            finally:
                tree.refresh(child.pid)
                await end_process(child)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


async def answers(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.TransportError:
        return False


def completion(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": "m",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def stock_stream(client: httpx.AsyncClient, max_tokens: int, prompt: str = PROMPT) -> int:
    """Stream one completion to its end and return the number of its tokens."""
    last = b""
    body = completion(prompt, max_tokens)
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for chunk in response.aiter_raw():
            last = (last + chunk)[-4096:]
    usage = [line for line in last.splitlines() if b'"usage":{' in line][-1]
    return int(json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"])


async def stock(figures: Figures, options: Options) -> None:
    for name, model in options.models.items():
        for _ in range(options.rounds):
            async with open_stock(model) as server:
                figures.add(f"stock {name} ready s", server.ready)
                await stock_stream(server.client, 1)
                seconds = time.monotonic() - server.started
                figures.add(f"stock {name} first token s", seconds)
                figures.add(f"stock {name} twice first token s", 2 * seconds)


# rbee ---------------------------------------------------------------------------------------------
@attrs.frozen
class Cluster:
    """A running queen of the benchmark's own, called with the operator's token."""

    client: httpx.AsyncClient
    home: Home
    env: Mapping[str, str]
    token: str

    async def workers(self) -> list[dict[str, Any]]:
        found = (await self.client.get("/v2/workers")).raise_for_status().json()
        return found if isinstance(found, list) else found["workers"]

    async def start_worker(self, model: Path) -> tuple[dict[str, Any], float]:
        """Order a worker; return it and the seconds until it was ready."""
        started = time.monotonic()
        response = await self.client.post("/v2/workers", json={"model": str(model)})
        worker = response.raise_for_status().json()
        with trio.fail_after(START_LIMIT):
            while worker["state"] != "ready":
                if worker["state"] in ("failed", "stopped"):
                    raise GaveUpError(f"the worker did not start: {worker}")
                await trio.sleep(0.01)
                worker = await self._worker(worker["worker_id"])
        return worker, time.monotonic() - started

    async def _worker(self, worker_id: str) -> dict[str, Any]:
        found = [w for w in await self.workers() if w["worker_id"] == worker_id]
        return found[0] if found else {"state": "stopped"}

    async def stop_worker(self, worker_id: str) -> None:
        (await self.client.delete(f"/v2/workers/{worker_id}")).raise_for_status()
        with trio.fail_after(STOP_LIMIT):
            while True:
                if (await self._worker(worker_id))["state"] == "stopped":
                    return
                await trio.sleep(0.02)


@contextmanager
def own_home() -> Iterator[tuple[Home, dict[str, str], Tree]]:
    """Make a home of the benchmark's own; whatever runs on it is gone afterwards."""
    marker = secrets.token_hex(8)
    with own_directory() as directory, no_leftovers(marker) as tree:
        runtime = directory / "run"
        runtime.mkdir(mode=0o700)
        env = environment(directory, marker) | {
            "RBEE_HOME": str(directory / "home"),
            "XDG_RUNTIME_DIR": str(runtime),
        }
        home = find_home(env["RBEE_HOME"], env)
        try:
            yield home, env, tree
        except BaseException:
            for log in sorted(home.logs.glob("*.log")):
                show(f"--- {log.name}\n{tail(log)}")
            raise


@asynccontextmanager
async def open_cluster(
    config: str = "", variables: Mapping[str, str] | None = None
) -> AsyncIterator[Cluster]:
    """Run an operator's queen for the body; ``config`` is the text of its config.toml."""
    with own_home() as (home, env, _):
        env |= variables or {}
        home.root.mkdir(parents=True)
        home.config_file.write_text(config)
        log = Path(env["TMPDIR"]) / "queen.log"
        argv = [program("queen-rbee"), "daemon", "--port", "0"]
        with log.open("wb") as output:
            child = subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

        async def is_written() -> bool:
            return home.queen_file.exists()

        try:
            await until(is_written, child)
            token = home.token_file.read_text().strip()
            async with httpx.AsyncClient(
                base_url=json.loads(home.queen_file.read_text())["url"],
                headers={"authorization": f"Bearer {token}"},
                trust_env=False,
                timeout=None,
            ) as client:
                yield Cluster(client, home, env, token)
        except GaveUpError:
            show(tail(log))
            raise
        finally:
            await end_process(child)


def program(name: str) -> str:
    """Return the program of the Python that runs this, whatever PATH says."""
    return str(Path(sys.executable).with_name(name))


async def execute(client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Run one job to its end and return its ``end`` event."""
    last = b""
    headers = {"accept": "text/event-stream"}
    async with client.stream("POST", path, json=dict(body), headers=headers) as response:
        response.raise_for_status()
        async for chunk in response.aiter_raw():
            last = (last + chunk)[-4096:]
    event, _, data = last.rstrip().rpartition(b"\n")
    if not event.endswith(b"event: end"):
        raise GaveUpError(f"{path} did not end well: {last.decode(errors='replace')}")
    end: dict[str, Any] = json.loads(data.removeprefix(b"data:"))
    return end


async def zygote(figures: Figures, options: Options) -> None:
    async with open_cluster() as cluster:
        worker, seconds = await cluster.start_worker(options.models["tiny"])
        figures.add("first worker of a hive ready s", seconds)
        await cluster.stop_worker(worker["worker_id"])
        for name, model in options.models.items():
            for _ in range(options.rounds):
                worker, seconds = await cluster.start_worker(model)
                figures.add(f"zygote {name} ready s", seconds)
                await cluster.stop_worker(worker["worker_id"])


async def swap(figures: Figures, options: Options) -> None:
    first, second = options.models["tiny"], options.models["tiny"].with_name("tiny-too")
    shutil.copytree(first, second, dirs_exist_ok=True)
    async with open_cluster(f'[hive]\nmemory = "{ROOM_FOR_ONE}"\n') as cluster:

        async def answer(model: Path) -> None:
            task = {"model": str(model), "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
            await execute(cluster.client, "/v2/tasks", task)

        await answer(second)
        await answer(first)
        for _ in range(options.rounds):
            started = time.monotonic()
            await answer(second)
            await answer(first)
            figures.add("swap A to B to A s", time.monotonic() - started)
            if len(there := await cluster.workers()) != 1:
                raise GaveUpError(f"there was room for more than one: {there}")


async def first_byte(argv: Sequence[str], env: Mapping[str, str]) -> float:
    """Run a command to its end; return the seconds from its start to its first output."""
    with tempfile.TemporaryFile() as errors:
        started = time.monotonic()
        child = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
        assert child.stdout is not None
        try:
            await trio.lowlevel.wait_readable(child.stdout)
            seconds = time.monotonic() - started
            while os.read(child.stdout.fileno(), 65536):
                await trio.lowlevel.wait_readable(child.stdout)
            await wait_process(child)
        finally:
            child.terminate()
            status = child.wait()
            child.stdout.close()
        if status:
            errors.seek(0)
            show(errors.read().decode(errors="replace"))
            raise GaveUpError(f"{argv[0]} exited with {status}")
        return seconds


def infer(model: Path) -> list[str]:
    argv = [program("rbee-keeper"), "infer", "--model", str(model), "--prompt", PROMPT]
    return [*argv, "--max-tokens", "4", "--temperature", "0"]


async def cold(figures: Figures, options: Options) -> None:
    for name, model in options.models.items():
        for _ in range(options.rounds):
            with own_home() as (_, env, _):
                figures.add(f"cold {name} first token s", await first_byte(infer(model), env))


async def warm(figures: Figures, options: Options) -> None:
    imports = [sys.executable, "-c", "import trio, httpx, cyclopts; print()"]
    model = options.models["tiny"]
    task = {"model": str(model), "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    async with open_cluster() as cluster:
        await cluster.start_worker(model)
        await first_byte(infer(model), cluster.env)
        for _ in range(max(5, options.rounds)):  # in turns: both see the same machine
            seconds = await first_byte(infer(model), cluster.env)
            end = await execute(cluster.client, "/v2/tasks", task)
            figures.add("warm worker ttft s", end["ttft_ms"] / 1000)
            figures.add("warm infer less ttft s", seconds - end["ttft_ms"] / 1000)
            figures.add("import trio, httpx, cyclopts s", await first_byte(imports, cluster.env))


async def front(figures: Figures, options: Options) -> None:
    model = options.models["tiny"]
    async with open_cluster() as cluster:
        worker, _ = await cluster.start_worker(model)
        async with httpx.AsyncClient(
            base_url=worker["url"],
            headers={"authorization": f"Bearer {cluster.token}"},
            trust_env=False,
            timeout=None,
        ) as client:

            async def run(prompt: str) -> int:
                job = {"job_id": f"job-{secrets.token_hex(4)}", "prompt": prompt, "raw": True}
                job |= {"max_tokens": TOKENS, "temperature": 0}
                return int((await execute(client, "/execute", job))["tokens_out"])

            for _ in range(options.rounds):
                figures.add("front worker us/token", await front_cost(run, worker["pid"]))
    async with open_stock(model) as server:

        async def complete(prompt: str) -> int:
            return await stock_stream(server.client, TOKENS, prompt)

        for _ in range(options.rounds):
            figures.add("front stock us/token", await front_cost(complete, server.pid))


async def front_cost(run: Callable[[str], Awaitable[int]], pid: int) -> float:
    """Return the microseconds of CPU that ``pid`` takes per token of 16 streams at once."""
    await run("warm up")
    tokens: list[int] = []

    async def one(number: int) -> None:
        tokens.append(await run(f"{number} once upon a time"))

    before = cpu_seconds(pid)
    async with trio.open_nursery() as nursery:
        for number in range(STREAMS):
            nursery.start_soon(one, number)
    return (cpu_seconds(pid) - before) / sum(tokens) * 1e6


# command line -------------------------------------------------------------------------------------
PARTS = {
    "stock": stock, "zygote": zygote, "cold": cold, "warm": warm, "swap": swap, "front": front,
}  # fmt: skip


@attrs.frozen
class Options:
    """What to measure with which of the models ``tiny`` and ``smol``."""

    parts: tuple[str, ...]
    models: Mapping[str, Path]
    rounds: int


def parse(argv: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--tiny", type=Path, help="directory of another tiny model")
    parser.add_argument("--smol", type=Path, help="directory of SmolLM2-135M as safetensors")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(argv)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    models = {"tiny": given.tiny, "smol": given.smol or cached_smol()}
    for model in filter(None, models.values()):
        if not (model / "config.json").is_file():
            parser.error(f"{model} holds no config.json")
    found = {name: model.resolve() for name, model in models.items() if model}
    return Options(tuple(given.parts or PARTS), found, given.rounds)


def cached_smol() -> Path | None:
    """Return SmolLM2-135M as this user's home has it for vLLM."""
    for item in list_models(find_home()):
        entry = item.entry
        if entry and not item.damage and entry.dtype != GGUF and "smollm2" in entry.reference:
            return item.directory
    return None


async def measure(options: Options) -> Figures:
    figures = Figures()
    with own_directory() as directory:
        if "tiny" not in options.models:
            tiny = write_tiny_model(directory / "tiny")
            options = attrs.evolve(options, models={"tiny": tiny, **options.models})
        for part in options.parts:
            show(f"--- {part}")
            await PARTS[part](figures, options)
    return figures


def main() -> None:
    try:
        figures = trio.run(measure, parse())
    except* GaveUpError as group:
        raise SystemExit(str(group.exceptions[0])) from None
    show("\n" + table(figures))
    medians = {name: figures.median(name) for name in figures.samples}
    print(json.dumps({"medians": medians, "ratios": figures.ratios()}, indent=2))


if __name__ == "__main__":
    main()
