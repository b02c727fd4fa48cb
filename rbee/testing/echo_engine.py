"""An engine without a model: it repeats the prompt's words at a set rate.

Same protocol, same HTTP, same process tree and death rules as vLLM: it has a real child process
as its "engine process", and when that dies the engine is dead. Imports no torch.

``spec.engine_args``, or the model's name as in ``echo?rate=20&load=3``: ``rate`` (tokens a second
and request), ``latency`` (seconds to the first),
``load`` (seconds of loading), ``context`` (words), ``slots`` (requests at once; others wait),
``fail``: ``load``, ``canary`` or ``after=N``
(the engine process is killed when a request wants its N+1st token).
"""

from __future__ import annotations

import os
import select
import signal
import warnings
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import parse_qsl

import attrs
import trio

from rbee.errors import BadInputError, ChildExitedError, MachineError, PeerError
from rbee.guard import close_all_but, die_with_parent
from rbee.hints import infer
from rbee.model import WorkerSpec
from rbee.testing.echo_api import EchoApi
from rbee.wire.messages import ExecuteRequest
from rbee.worker.engine import ASGIApp, Chunk, Engine, Progress
from rbee.worker.limits import answer_budget

DEFAULT_COUNT = 16
KINDS = {"rate": float, "latency": float, "load": float, "context": int, "slots": int, "fail": str}
EXAMPLE = infer("--engine", "echo", model="echo?rate=20")
TELL = 0.1  # seconds between two words about the loading
NOTICE = 0.2  # seconds in which a waiting request notices that the engine process died


@attrs.frozen
class EchoOptions:
    rate: float = 100.0
    latency: float = 0.0
    load: float = 0.0
    context: int = 4096
    slots: int = 256
    fail: str = ""

    @property
    def fail_after(self) -> int | None:
        """After how many tokens of a request the engine process is killed."""
        if self.fail == "canary":
            return 0
        return int(self.fail.partition("=")[2]) if self.fail.startswith("after=") else None


def model_options(model: str) -> dict[str, str]:
    """Return the options in a model's name, as in ``echo?rate=20&load=3``."""
    return dict(parse_qsl(model.partition("?")[2]))


def echo_options(spec: WorkerSpec) -> EchoOptions:
    given: dict[str, object] = {}
    if spec.max_model_len is not None:
        given["context"] = spec.max_model_len
    if spec.max_num_seqs is not None:
        given["slots"] = spec.max_num_seqs
    for key, text in {**model_options(spec.model), **spec.engine_args}.items():
        if key not in KINDS:
            raise BadInputError(
                f"the echo engine has no {key!r}; it takes {', '.join(KINDS)}", hint=EXAMPLE
            )
        try:
            given[key] = KINDS[key](text)
        except ValueError as exc:
            raise BadInputError(f"{key} is not a number: {text!r}", hint=EXAMPLE) from exc
    options = EchoOptions(**given)  # type: ignore[arg-type]
    if not (options.rate > 0 and options.context > 1 and options.slots > 0):
        raise BadInputError(
            "the echo engine needs rate > 0, context > 1 and slots > 0", hint=EXAMPLE
        )
    is_after = options.fail.startswith("after=") and options.fail[6:].isdigit()
    if options.fail not in ("", "load", "canary") and not is_after:
        raise BadInputError(f"fail is load, canary or after=N: {options.fail!r}", hint=EXAMPLE)
    return options


class EngineProcess:
    """A child that does nothing but live; it goes with its parent and can be killed."""

    def __init__(self) -> None:
        hold_read, self._hold = os.pipe()  # the child's EOF: this process is gone
        self._life, life_write = os.pipe()  # this process's EOF: the child is gone
        parent = os.getpid()
        with warnings.catch_warnings():
            # The child runs straight into a read, whatever threads there were.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _be_engine(parent, hold_read, life_write)
        os.close(hold_read)
        os.close(life_write)
        self._status: int | None = None

    def is_dead(self) -> bool:
        return bool(select.select([self._life], [], [], 0)[0])

    async def wait(self) -> str:
        """Return how it ended, as soon as it has."""
        await trio.lowlevel.wait_readable(self._life)
        self._reap()
        code = os.waitstatus_to_exitcode(self._status or 0)
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return f"the engine process {self.pid} ended with {how}"

    def kill(self) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)  # our own child, not reaped yet

    async def die(self) -> None:
        """Kill it and return when it is dead."""
        self.kill()
        while not self.is_dead():  # `wait` has the one place to wait for the descriptor
            await trio.sleep(0.005)

    def close(self) -> None:
        self.kill()
        self._reap()
        os.close(self._hold)
        os.close(self._life)

    def _reap(self) -> None:
        if self._status is None:
            self._status = os.waitpid(self.pid, 0)[1]


def _be_engine(parent: int, hold: int, life: int) -> None:
    """Never returns: the forked child leaves nothing of its parent's running."""
    try:
        import setproctitle

        signal.set_wakeup_fd(-1)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        die_with_parent(signal.SIGKILL, parent)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        close_all_but([hold, life])
        setproctitle.setproctitle("echo-engine")
        os.read(hold, 1)
    finally:
        os._exit(0)


class EchoGeneration:
    """Words that fall due at the set rate; all that are due come in one step."""

    def __init__(self, engine: EchoEngine, words: list[str], total: int, last: str) -> None:
        self.tokens_in = len(words)
        self._engine = engine
        self._words = words
        self._total = total
        self._last = last
        self._done = 0
        self._start = trio.current_time() + engine.options.latency

    def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        return self

    async def __anext__(self) -> list[Chunk]:
        if self._done == self._total:
            raise StopAsyncIteration
        limit = self._engine.options.fail_after
        if limit is not None and self._done >= limit:
            await self._engine.process.die()
        await self._sleep_until_due()
        due = int((trio.current_time() - self._start) * self._engine.options.rate) + 1
        until = min(max(due, self._done + 1), self._total)
        if limit is not None:
            until = min(until, max(limit, self._done + 1))
        return [self._chunk(index) for index in range(self._done, until)]

    async def _sleep_until_due(self) -> None:
        due = self._start + self._done / self._engine.options.rate
        while True:
            await trio.sleep(min(max(due - trio.current_time(), 0), NOTICE))
            if self._engine.process.is_dead():
                raise PeerError("the engine process has died", code="engine_died")
            if trio.current_time() >= due:
                return

    def _chunk(self, index: int) -> Chunk:
        self._done = index + 1
        word = self._words[index % len(self._words)]
        text = word if index == 0 else f" {word}"
        return Chunk(text, 1, self._last if self._done == self._total else None)


class EchoEngine:
    app: ASGIApp | None

    def __init__(
        self, options: EchoOptions, process: EngineProcess, names: tuple[str, ...] = ()
    ) -> None:
        self.app = EchoApi(self, names)
        self.options = options
        self.context = options.context
        self.slots = options.slots
        self.process = process
        self._running = 0
        self._batch = trio.Semaphore(options.slots)

    def running(self) -> int:
        return self._running

    def metrics(self) -> str:
        return ""

    @asynccontextmanager
    async def generate(self, request: ExecuteRequest) -> AsyncGenerator[EchoGeneration, None]:
        words = _words(request)
        left = answer_budget(request.max_tokens, len(words), self.context)
        total = left if request.max_tokens else min(left, DEFAULT_COUNT)
        self._running += 1
        try:
            async with self._batch:
                yield EchoGeneration(self, words, total, "length" if request.max_tokens else "stop")
        finally:
            self._running -= 1

    async def wait_dead(self) -> str:
        return await self.process.wait()


def _words(request: ExecuteRequest) -> list[str]:
    if request.messages is not None:
        return " ".join(message.content for message in request.messages).split()
    return (request.prompt or "").split()


async def _load(process: EngineProcess, seconds: float, progress: Progress) -> None:
    """Take the time of loading, and tell how far it is, as an engine with weights would.

    Raises:
        ChildExitedError: the engine process has died meanwhile.
    """
    began = trio.current_time()
    while (left := began + seconds - trio.current_time()) > 0:
        if process.is_dead():
            raise ChildExitedError(f"{await process.wait()} while loading", code="engine_died")
        progress("weights", 1 - left / seconds)
        await trio.sleep(min(left, TELL))


class EchoEngineKind:
    name = "echo"
    needs_model = False

    def preload(self) -> None:
        import rbee.worker.daemon  # noqa: F401

    def check(self, spec: WorkerSpec) -> None:
        if spec.backend != "cpu":
            raise BadInputError(
                f"the echo engine runs on cpu only, not on {spec.backend!r}",
                hint=infer("--engine", "echo", "--backend", "cpu", model="echo"),
            )
        if spec.device != "0":
            raise BadInputError(
                f"device {spec.device!r} is not there: cpu has device 0 only",
                hint=infer("--engine", "echo", "--device", 0, model="echo"),
            )
        echo_options(spec)

    @asynccontextmanager
    async def open(
        self, spec: WorkerSpec, *, run_dir: str, progress: Progress
    ) -> AsyncGenerator[Engine, None]:
        options = echo_options(spec)
        progress("weights", 0.0)
        process = EngineProcess()
        try:
            await _load(process, options.load, progress)
            if options.fail == "load":
                raise MachineError("the echo engine was told to fail while loading")
            yield EchoEngine(options, process, (spec.model, *spec.served_names))
        finally:
            with suppress(ProcessLookupError):
                process.close()
