"""What every engine must do; the same tests for echo and for vLLM (tiny model)."""

import importlib.util
import os
import signal
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from rbee.errors import BadInputError, PeerError
from rbee.model import WorkerId, WorkerSpec
from rbee.testing.echo_engine import EchoEngineKind
from rbee.testing.tiny_model import write_tiny_model
from rbee.wire.messages import ExecuteRequest, Message
from rbee.worker.vllm_engine import VllmEngineKind

NO_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed: pip install rbee[cpu]"
)
KINDS = [
    pytest.param(EchoEngineKind(), id="echo"),
    pytest.param(
        VllmEngineKind(),
        id="vllm",
        marks=[
            pytest.mark.vllm,
            pytest.mark.slow,
            NO_VLLM,
            pytest.mark.filterwarnings("ignore"),  # vLLM's and torch's own
        ],
    ),
]
CONTEXT = 256


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def own_process(monkeypatch):
    """Undo what an engine changes in the process that it takes for its own."""
    monkeypatch.setattr(tempfile, "tempdir", tempfile.tempdir)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(params=KINDS)
def open_engine(request, tiny_model, own_process):
    kind = request.param

    @asynccontextmanager
    async def open_one():
        with tempfile.TemporaryDirectory(prefix="rbee-t-", dir="/tmp") as run_dir:
            spec = WorkerSpec(
                WorkerId("w"), "tiny", str(tiny_model), engine=kind.name, max_model_len=CONTEXT
            )
            kind.check(spec)
            with trio.fail_after(180):
                async with kind.open(spec, run_dir=run_dir, progress=lambda text: None) as engine:
                    yield engine

    return open_one


def ask(**given):
    return ExecuteRequest("job", **{"prompt": "hello there bee", "temperature": 0.0} | given)


def children():
    """Pids of this process's children, whichever thread forked them."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


async def collect(engine, request):
    async with engine.generate(request) as generation:
        chunks = [chunk async for batch in generation for chunk in batch]
        return generation.tokens_in, chunks


async def wait_idle(engine):
    with trio.fail_after(2):
        while engine.running():  # noqa: ASYNC110  another thread's figure has no event
            await trio.sleep(0.01)


async def test_an_engine_generates_refuses_and_aborts(open_engine):
    before = children()
    async with open_engine() as engine:
        assert engine.context == CONTEXT
        await _it_streams_tokens_and_ends(engine)
        await _messages_are_a_prompt_too(engine)
        await _requests_run_at_once(engine)
        await _leaving_aborts(engine)
        for given in (
            {"prompt": "bee " * CONTEXT},
            {"prompt": "b" * 1_000_000 + " bee" * CONTEXT},
            {"max_tokens": CONTEXT},
        ):
            with pytest.raises(BadInputError, match=str(CONTEXT)):
                await collect(engine, ask(**given))
            assert engine.running() == 0
    assert children() <= before


async def _it_streams_tokens_and_ends(engine):
    tokens_in, chunks = await collect(engine, ask(max_tokens=12))
    assert tokens_in > 0
    assert sum(chunk.tokens for chunk in chunks) == 12
    assert [chunk.finish for chunk in chunks if chunk.finish] == ["length"]
    assert chunks[-1].finish == "length"
    assert "".join(chunk.text for chunk in chunks)
    assert (tokens_in, chunks) == await collect(engine, ask(max_tokens=12))
    await wait_idle(engine)


async def _messages_are_a_prompt_too(engine):
    messages = (Message("system", "be brief"), Message("user", "hello"))
    tokens_in, chunks = await collect(engine, ask(prompt=None, messages=messages, max_tokens=2))
    assert tokens_in > 0
    assert sum(chunk.tokens for chunk in chunks) == 2


async def _requests_run_at_once(engine):
    counts = []

    async def one():
        _, chunks = await collect(engine, ask(max_tokens=20))
        counts.append(sum(chunk.tokens for chunk in chunks))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(one)
    assert counts == [20] * 4


async def _leaving_aborts(engine):
    async with engine.generate(ask(max_tokens=CONTEXT // 2)) as generation:
        async for _ in generation:
            assert engine.running() == 1
            break
    await wait_idle(engine)


async def test_the_engines_death_is_noticed_within_a_second(open_engine):
    before = children()
    async with open_engine() as engine, engine.generate(ask(max_tokens=100)) as generation:
        await anext(generation)
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(1):
            assert "SIGKILL" in await engine.wait_dead()
        with trio.fail_after(5), pytest.raises(PeerError) as info:
            await _drain(generation)
    assert info.value.code == "engine_died"
    assert children() <= before


async def _drain(generation):
    async for _ in generation:
        pass
