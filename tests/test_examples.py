"""Every example runs as it stands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import trio

from rbee.home import Home
from rbee.testing.processes import LeakCheck
from tests.keeper.test_infer import keeper

EXAMPLES = Path(__file__).parent.parent / "examples"

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


async def run_example(name: str, *arguments: str) -> str:
    argv = [sys.executable, str(EXAMPLES / name), *arguments]
    done = await trio.run_process(argv, capture_stdout=True)
    return done.stdout.decode()


def test_each_example_has_a_test() -> None:
    tested = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if path.name not in tested] == []
