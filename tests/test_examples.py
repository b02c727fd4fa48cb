"""Every example runs as it stands."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import trio

import rbee
from rbee.home import Home
from rbee.testing.processes import LeakCheck
from tests.keeper.test_infer import keeper

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = "echo?rate=2000"

pytestmark = pytest.mark.slow


async def test_stream_answer_prints_what_the_queen_streams(home: Home, leaks: LeakCheck) -> None:
    assert (await keeper("queen", "start", "--port", "0")).returncode == 0
    try:
        done = await run_example("stream_answer.py", "one two", "echo?rate=200", "echo")
        assert done.startswith("one two one two")
        assert "64 tokens" in done
    finally:
        assert (await keeper("queen", "stop")).returncode == 0
    await leaks.wait_clean(2)


async def test_embed_trio_answers_each_question(leaks: LeakCheck) -> None:
    done = await run_example("embed_trio.py", QUICK, "echo")
    assert sorted(line.partition("?")[0] for line in done.splitlines()) == [
        "What is a bee", "What is a hive", "What is a queen",
    ]  # fmt: skip
    assert "on localhost" in done
    assert leaks.find() == []


async def test_compare_models_tells_both(leaks: LeakCheck) -> None:
    done = await run_example("compare_models.py", "a bee", QUICK, "echo?rate=1000", "echo")
    assert [line.partition(" ")[0] for line in done.splitlines()] == [QUICK, "echo?rate=1000"]
    assert leaks.find() == []


async def test_map_prompts_uses_all_workers(leaks: LeakCheck) -> None:
    done = await run_example("map_prompts.py", QUICK, "echo", "2")
    assert done.startswith("200 answers from 2 workers; the first: Give me a fact")
    assert leaks.find() == []


async def test_web_app_owns_its_cluster(leaks: LeakCheck) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    argv = [sys.executable, str(EXAMPLES / "web_app.py"), QUICK, "echo", port]
    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(trio.run_process, argv)
            async with httpx.AsyncClient(trust_env=False) as client:
                while True:
                    try:
                        answer = await client.post(f"http://127.0.0.1:{port}/", content=b"one two")
                        break
                    except httpx.ConnectError:
                        await trio.sleep(0.1)  # it tells nobody but its terminal
            process.terminate()
            await process.wait()
            assert leaks.find() == []
    assert answer.text.startswith("one two one two")


@pytest.mark.skipif(find_spec("openai") is None, reason="needs openai")
@pytest.mark.skipif(find_spec("rbee.queen.openai") is None, reason="this queen has no /v1 yet")
async def test_openai_client_is_answered(leaks: LeakCheck) -> None:
    done = await run_example("openai_client.py", "one two", QUICK, "echo")
    assert done.startswith("one two one two")
    assert leaks.find() == []


async def test_your_suite_passes(leaks: LeakCheck, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "test_your_suite.py", tmp_path)
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "-q"]
    done = await trio.run_process(argv, cwd=tmp_path, capture_stdout=True, check=False)
    assert b"3 passed" in done.stdout, done.stdout.decode()
    assert leaks.find() == []


async def test_shout_engine_is_found_by_its_entry_point(
    leaks: LeakCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_shout_engine(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with rbee.open_cluster(models=["loud"], engine="shout") as cluster:
        answer = await cluster.client.infer("loud", "hello bees and others", max_tokens=2)
    assert (answer.text, answer.stop_reason) == ("HELLO BEES", "length")
    assert leaks.find() == []


def install_shout_engine(where: Path) -> None:
    """Do as pip does, without an index: the module, and its entry point beside it."""
    shutil.copy(EXAMPLES / "shout_engine" / "shout_engine.py", where)
    info = where / "shout_engine-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shout-engine\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[rbee.engines]\nshout = shout_engine:ShoutEngineKind\n")


async def run_example(name: str, *arguments: str, env: Mapping[str, str] = os.environ) -> str:
    argv = [sys.executable, str(EXAMPLES / name), *arguments]
    with trio.fail_after(60):
        done = await trio.run_process(argv, capture_stdout=True, env=dict(env))
    return done.stdout.decode()


def test_each_example_has_a_test() -> None:
    tested = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.rglob("*.py") if path.name not in tested] == []
