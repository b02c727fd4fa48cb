"""The command line with the real queen, hive and worker, and the echo engine."""

from __future__ import annotations

import json
import os
import re
import signal
import sys

import pytest
import trio

from rbee.home import Home
from rbee.testing.processes import LeakCheck
from tests.keeper.test_infer import keeper, open_keeper, read_until
from tests.terminal import open_terminal, screen

pytestmark = pytest.mark.slow

ECHO = ("infer", "--model", "echo", "--engine", "echo", "--prompt", "a b", "--max-tokens", "4")


@pytest.fixture(autouse=True)
def any_port(home: Home) -> None:
    home.config_file.write_text("port = 0\n[queen]\nport = 0\n")


async def test_a_cold_infer_answers_and_leaves_nothing_behind(home: Home, leaks: LeakCheck) -> None:
    done = await keeper(*ECHO)
    assert (done.returncode, done.stdout) == (0, b"a b a b\n")
    assert b"rbee-keeper queen start" in done.stderr  # how to keep it warm
    await leaks.wait_clean(1)


async def test_the_loading_is_shown_from_the_engine_to_the_terminal(
    home: Home, leaks: LeakCheck
) -> None:
    line = ("infer", "--model", "echo?load=2", "--engine", "echo", "--prompt", "a b")
    environment = os.environ | {"TERM": "xterm", "NO_COLOR": "1"}
    with open_terminal() as terminal:
        async with open_keeper(*line, stderr=terminal.fd, env=environment) as process:
            answer = await read_until(process.stdout, b"a b\n")
    assert (process.returncode, answer) == (0, b"a b " * 7 + b"a b\n")
    shares = [int(n) for n in re.findall(r"· weights [━╌]+ +(\d+) %", terminal.text)]
    assert len(set(shares)) >= 4
    assert shares == sorted(shares)
    (line_left,) = [line for line in screen(terminal.text) if line.startswith("hive: load")]
    assert re.fullmatch(r"hive: load echo\?load=2 with echo on cpu … [2-5]\.\d s", line_left)
    await leaks.wait_clean(1)


async def test_a_standing_queen_keeps_the_worker_warm(home: Home, leaks: LeakCheck) -> None:
    try:
        assert (await keeper("queen", "start")).returncode == 0
        first, second = [json.loads((await keeper(*ECHO, "--json")).stdout) for _ in range(2)]
        assert first["worker_id"] == second["worker_id"]
        rows = json.loads((await keeper("ps", "--json")).stdout)
        assert [row["component"] for row in rows] == ["queen", "hive", "worker"]
    finally:
        stopped = await keeper("queen", "stop")
    assert stopped.returncode == 0
    await leaks.wait_clean(1)


async def test_an_unknown_node_is_refused_with_the_known_ones(home: Home, leaks: LeakCheck) -> None:
    done = await keeper(*ECHO, "--node", "elsewhere")
    assert done.returncode == 1
    assert b"elsewhere" in done.stderr
    assert b"localhost" in done.stderr
    await leaks.wait_clean(1)


async def test_a_command_that_was_stopped_for_a_moment_goes_on(
    home: Home, leaks: LeakCheck
) -> None:
    line = ("infer", "--model", "echo?rate=20", "--engine", "echo", "--prompt", "a b")
    async with open_keeper(*line, "--max-tokens", "40") as process:
        await read_until(process.stdout, b"a")
        process.send_signal(signal.SIGSTOP)
        await trio.sleep(1)
        process.send_signal(signal.SIGCONT)
        await process.wait()
        assert process.returncode == 0
    await leaks.wait_clean(1)


def test_python_m_rbee_is_the_keeper() -> None:
    import rbee.__main__
    import rbee.keeper.app

    assert sys.modules["rbee.__main__"].main is rbee.keeper.app.main
