"""``infer`` as a process, against a real small queen over loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio

from rbee.client import AsyncClient
from rbee.home import Home
from rbee.keeper.infer import _ending
from rbee.testing.processes import LeakCheck
from rbee.wire.messages import Error, Token
from tests.keeper import fake_queen
from tests.keeper.fake_queen import FakeQueen, answer, open_fake

pytestmark = pytest.mark.slow

INFER = ("infer", "--model", "m", "--prompt", "hi")
ENDLESS: list[object] = [*answer("one\n")[:-1], None]


async def keeper(*line: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    with trio.fail_after(30):
        return await trio.run_process(
            [sys.executable, "-m", "rbee", *line],
            capture_stdout=True, capture_stderr=True, check=False, **options,
        )  # fmt: skip


@asynccontextmanager
async def open_keeper(*line: str, **options: Any) -> AsyncGenerator[trio.Process, None]:
    """Run the command beside the body; it must end by itself."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = await trio.lowlevel.open_process([sys.executable, "-m", "rbee", *line], **options)
    try:
        with trio.fail_after(30):
            yield process
            await process.wait()
    finally:
        process.kill()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                await trio.aclose_forcefully(stream)
        await process.wait()


async def read_until(stream: Any, needle: bytes) -> bytes:
    got = b""
    while needle not in got:
        more = await stream.receive_some()
        assert more, got
        got += more
    return got


async def test_the_answer_is_data_and_all_else_narration(home: Home) -> None:
    async with open_fake(home=home) as (queen, _):
        done = await keeper(*INFER, "--seed", "7", "--stop", "a", "--stop", "b")
    assert (done.returncode, done.stdout) == (0, b"Hello world\n")
    assert done.stderr == b"hive: worker starting a worker\n"
    (task,) = queen.tasks
    assert (task.model, task.prompt, task.seed, task.stop) == ("m", "hi", 7, ("a", "b"))


async def test_an_answer_as_json_is_one_object(home: Home) -> None:
    async with open_fake(home=home):
        done = await keeper(*INFER, "--json")
    assert json.loads(done.stdout) == {
        "text": "Hello world", "tokens_in": 3, "tokens_out": 3, "stop_reason": "stop",
        "ttft_ms": 1.5, "duration_ms": 9.5, "model": "echo", "node": "localhost",
        "worker_id": "worker-1", "job_id": "job-1",
    }  # fmt: skip


async def test_a_prompt_can_come_from_stdin(home: Home) -> None:
    async with open_fake(home=home) as (queen, _):
        done = await keeper("infer", "--model", "m", "--prompt", "-", stdin=b"from a pipe\n")
    assert done.returncode == 0
    assert queen.tasks[0].prompt == "from a pipe"


async def test_tokens_come_out_as_they_come(home: Home) -> None:
    queen = FakeQueen(script=[*answer("a", "b")[:-1], None])
    async with open_fake(queen, home), open_keeper(*INFER) as process:
        await read_until(process.stdout, b"ab")
        assert process.returncode is None  # it is not the end that brought them
        process.terminate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
async def test_a_signal_cancels_the_job_and_is_the_exit_code(
    home: Home, number: int, code: int
) -> None:
    queen = FakeQueen(script=ENDLESS)
    async with open_fake(queen, home):
        async with open_keeper(*INFER) as process:
            await read_until(process.stdout, b"one")
            process.send_signal(number)
            process.send_signal(number)  # the second meets no default handler
        assert process.returncode == code
        with trio.fail_after(5):
            await queen.cancelled.wait()


async def test_a_reader_that_has_enough_ends_the_job_quietly(home: Home) -> None:
    queen = FakeQueen(script=[Token("one\n", 1), *([0.01, Token("more\n", 2)] * 2000), None])
    async with open_fake(queen, home):
        async with open_keeper(*INFER) as process:
            assert process.stdout is not None
            await read_until(process.stdout, b"one\n")
            await process.stdout.aclose()
            assert await process.stderr.receive_some() == b""  # type: ignore[union-attr]
        assert process.returncode == 0
        with trio.fail_after(5):
            await queen.cancelled.wait()


async def test_a_reader_that_does_not_read_does_not_keep_a_signal_out(home: Home) -> None:
    queen = FakeQueen(script=[Token("x" * 500_000, 1), None])
    async with open_fake(queen, home), open_keeper(*INFER) as process:
        await read_until(process.stdout, b"x")
        process.terminate()
        await process.wait()
        assert process.returncode == 143


async def test_a_closed_stdout_is_no_crash(home: Home) -> None:
    async with open_fake(home=home):
        done = await trio.run_process(
            f"'{sys.executable}' -m rbee {' '.join(INFER)} >&-",
            shell=True, check=False, capture_stderr=True,
        )  # fmt: skip
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


async def test_a_timeout_cancels_the_job_and_fails(home: Home) -> None:
    queen = FakeQueen(script=ENDLESS)
    async with open_fake(queen, home):
        done = await keeper(*INFER, "--timeout", "1.5")
        with trio.fail_after(5):
            await queen.cancelled.wait()
    assert done.returncode == 1
    assert done.stdout == b"one\n"
    assert b"error: not done within 1.5 s" in done.stderr


async def test_a_jobs_error_is_told_with_its_hint(home: Home) -> None:
    queen = FakeQueen(script=[Token("half", 1), Error("unknown_node", "no node x", "try y")])
    async with open_fake(queen, home):
        done = await keeper(*INFER)
    assert done.returncode == 1
    assert done.stdout == b"half\n"
    assert done.stderr == b"error: no node x\n  hint: try y\n"


async def test_another_commands_queen_that_goes_away_is_told_with_the_way_out(home: Home) -> None:
    async with open_fake(FakeQueen(script=answer("a")[:-1], owner="keeper-1"), home):
        done = await keeper(*INFER)
    assert done.returncode == 1
    assert b"keeper-1" in done.stderr
    assert b"hint: rbee-keeper queen start" in done.stderr


async def test_bad_values_start_nothing(home: Home, leaks: LeakCheck) -> None:
    done = await keeper(*INFER, "--temperature", "-1")
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: --temperature must be at least 0, got -1.0\n  hint: ")
    assert not list(home.run.iterdir())


async def test_a_home_that_cannot_be_written_is_told(home: Home) -> None:
    file = home.root / "file"
    file.touch()
    done = await keeper(*INFER, "--home", str(file / "home"))
    assert done.returncode == 1
    assert b"cannot write" in done.stderr
    assert b"Traceback" not in done.stderr


async def test_listing_into_a_closed_pipe_is_quiet(home: Home) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = await trio.run_process(
        [sys.executable, "-m", "rbee", "status"], stdout=writing, capture_stderr=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"no queen running\n")


# run ------------------------------------------------------------------------------------------
async def test_a_conversation_goes_on_with_what_was_said(home: Home) -> None:
    async with open_fake(home=home) as (queen, _):
        done = await keeper("run", "m", "--system", "be brief", stdin=b"one\n\ntwo\n/exit\nthree\n")
    assert (done.returncode, done.stdout) == (0, b"Hello world\nHello world\n")
    said = [(message.role, message.content) for message in queen.tasks[1].messages or ()]
    assert said == [
        ("system", "be brief"), ("user", "one"), ("assistant", "Hello world"), ("user", "two"),
    ]  # fmt: skip
    assert len(queen.tasks) == 2


async def test_the_end_of_stdin_ends_a_conversation(home: Home) -> None:
    async with open_fake(home=home) as (queen, _):
        done = await keeper("run", "m", stdin=b"no newline")
    assert (done.returncode, len(queen.tasks)) == (0, 1)


async def test_ctrl_c_ends_the_answer_first_and_then_the_conversation(home: Home) -> None:
    async with (
        open_fake(FakeQueen(script=ENDLESS), home),
        open_keeper("run", "m", "--json", stdin=subprocess.PIPE) as process,
    ):
        assert process.stdin is not None
        for _ in range(2):
            await process.stdin.send_all(b"a\n")
            await read_until(process.stderr, b"starting a worker")
            process.send_signal(signal.SIGINT)
            await read_until(process.stdout, b'"text": "')
        process.send_signal(signal.SIGINT)
        await process.wait()
        assert process.returncode == 130


@pytest.mark.parametrize(
    ("owner", "ending"), [("operator", "queen and worker"), ("queen-1", "queen, hive and worker")]
)
async def test_what_ends_with_a_queen_of_our_own_is_named(
    owner: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_queen, "HIVE", attrs.evolve(fake_queen.HIVE, owner=owner))
    async with open_fake() as (_, url), AsyncClient(url, fake_queen.TOKEN) as client:
        assert await _ending(client) == ending
