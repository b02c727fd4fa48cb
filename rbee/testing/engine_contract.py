"""What every engine must do, for authors of engines: ``python -m rbee.testing.engine_contract``.

    python -m rbee.testing.engine_contract ENGINE [MODEL_DIRECTORY]

Run it in a process of its own: an engine may take the process it runs in for its own. Prints one
line per rule; the first broken one ends it with an `AssertionError`. The engine must have exactly
one child process, whose death is its death.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import trio

from rbee import guard
from rbee.errors import BadInputError, PeerError
from rbee.model import WorkerId, WorkerSpec
from rbee.wire.messages import ExecuteRequest, Message
from rbee.worker.engine import Chunk, Engine, EngineKind, Generation, engine_kind

CONTEXT = 256
LOAD_LIMIT = 180.0

Rule = Callable[[Engine], Awaitable[None]]


def ask(**given: Any) -> ExecuteRequest:
    defaults: dict[str, Any] = {"prompt": "hello there bee", "temperature": 0.0}
    return ExecuteRequest("job", **defaults | given)


def children() -> set[int]:
    """Return the pids of this process's children, whichever thread forked them."""
    return set(guard.children(os.getpid()))


async def collect(engine: Engine, request: ExecuteRequest) -> tuple[int, list[Chunk]]:
    async with engine.generate(request) as generation:
        chunks = [chunk async for batch in generation for chunk in batch]
        return generation.tokens_in, chunks


async def wait_idle(engine: Engine) -> None:
    with trio.fail_after(2):
        while engine.running():
            await trio.sleep(0.01)


async def streams_tokens_and_ends_with_length(engine: Engine) -> None:
    tokens_in, chunks = await collect(engine, ask(max_tokens=12))
    assert tokens_in > 0
    assert sum(chunk.tokens for chunk in chunks) == 12
    assert [chunk.finish for chunk in chunks if chunk.finish] == ["length"]
    assert chunks[-1].finish == "length"
    assert "".join(chunk.text for chunk in chunks)
    await wait_idle(engine)


async def takes_messages(engine: Engine) -> None:
    messages = (Message("system", "be brief"), Message("user", "hello"))
    tokens_in, chunks = await collect(engine, ask(prompt=None, messages=messages, max_tokens=2))
    assert tokens_in > 0
    assert sum(chunk.tokens for chunk in chunks) == 2


async def runs_requests_at_once(engine: Engine) -> None:
    counts = []

    async def one() -> None:
        _, chunks = await collect(engine, ask(max_tokens=20))
        counts.append(sum(chunk.tokens for chunk in chunks))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(one)
    assert counts == [20] * 4


async def leaving_aborts(engine: Engine) -> None:
    async with engine.generate(ask(max_tokens=CONTEXT // 2)) as generation:
        async for _ in generation:
            assert engine.running() == 1
            break
    await wait_idle(engine)


async def refuses_what_does_not_fit_and_runs_nothing(engine: Engine) -> None:
    for given in (
        {"prompt": "bee " * CONTEXT},
        {"prompt": "b" * 1_000_000 + " bee" * CONTEXT},
        {"max_tokens": CONTEXT},
    ):
        refusal = ""
        try:
            await collect(engine, ask(**given))
        except BadInputError as error:
            refusal = str(error)
        assert str(CONTEXT) in refusal, f"{str(given)[:40]} is not refused: {refusal}"
        assert engine.running() == 0


RULES: tuple[Rule, ...] = (
    streams_tokens_and_ends_with_length,
    takes_messages,
    runs_requests_at_once,
    leaving_aborts,
    refuses_what_does_not_fit_and_runs_nothing,
)


@contextmanager
def as_it_was() -> Iterator[None]:
    """Undo what an engine does to its process: the next one would use directories that are gone."""
    environ = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environ)
        tempfile.tempdir = None


@asynccontextmanager
async def open_engine(kind: EngineKind, model_dir: str) -> AsyncGenerator[Engine, None]:
    """Load an engine with a context of `CONTEXT`; afterwards its processes are gone."""
    before = children()
    spec = WorkerSpec(
        WorkerId("contract"), "contract", model_dir, engine=kind.name, max_model_len=CONTEXT
    )
    kind.check(spec)
    directory = tempfile.TemporaryDirectory(prefix="rbee-c-", dir="/tmp")
    with as_it_was(), directory as run_dir:
        with trio.fail_after(LOAD_LIMIT):
            opened = kind.open(spec, run_dir=run_dir, progress=lambda text, share=None: None)
            engine = await opened.__aenter__()
        try:
            assert engine.context == CONTEXT
            yield engine
        finally:
            await opened.__aexit__(None, None, None)
    assert children() <= before, "closing left a process"


async def death_is_noticed_within_a_second(kind: EngineKind, model_dir: str) -> None:
    before = children()
    async with open_engine(kind, model_dir) as engine, engine.generate(ask(max_tokens=100)) as it:
        await anext(aiter(it))
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(1):
            assert "SIGKILL" in await engine.wait_dead()
        assert await _code_at_end(it) == "engine_died"


async def _code_at_end(generation: Generation) -> str:
    try:
        with trio.fail_after(5):
            async for _ in generation:
                pass
    except PeerError as error:
        return error.code
    return "none"


async def check_engine(kind: EngineKind, model_dir: str = "") -> None:
    """Hold an engine to all rules; raises at the first one it breaks."""
    async with open_engine(kind, model_dir) as engine:
        for rule in RULES:
            await rule(engine)
            _say(rule.__name__)
    _say("closing_frees_its_processes")
    await death_is_noticed_within_a_second(kind, model_dir)
    _say("death_is_noticed_within_a_second")


def _say(rule: str) -> None:
    sys.stdout.write(f"ok {rule.replace('_', ' ')}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    trio.run(check_engine, engine_kind(sys.argv[1]), "".join(sys.argv[2:3]))
    os._exit(0)  # an engine's own threads are not waited for
