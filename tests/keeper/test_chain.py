"""The command line with the real queen, hive and worker, and the echo engine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
import trio

from rbee import guard
from rbee.home import Home
from rbee.testing.processes import Identity, LeakCheck, Tree
from tests.keeper.test_infer import keeper, open_keeper, read_until
from tests.terminal import open_terminal, screen

pytestmark = pytest.mark.slow

ECHO = ("infer", "--model", "echo", "--engine", "echo", "--prompt", "a b", "--max-tokens", "4")


def all_below(pid: int) -> list[Identity]:
    with Tree(pid) as tree:
        return list(tree.noted)


@pytest.fixture(autouse=True)
def any_port(home: Home) -> None:
    home.config_file.write_text("port = 0\n[queen]\nport = 0\n")


async def test_a_cold_infer_answers_and_leaves_nothing_behind(
    home: Home, leaks: LeakCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        home.config_file.write_text(f"[queen]\nport = {taken.getsockname()[1]}\n")
        monkeypatch.setenv("RBEE_PORT", "0")  # before the file, also for a queen of its own
        done = await keeper(*ECHO)
    assert (done.returncode, done.stdout) == (0, b"a b a b\n")
    assert re.search(rb"queen at http://127\.0\.0\.1:\d+ \(none was running\)", done.stderr)
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


async def test_where_the_queen_listens_is_not_where_her_hive_does(
    home: Home, leaks: LeakCheck
) -> None:
    environment = os.environ | {"RBEE_HOST": "127.0.0.2"}
    try:
        assert (await keeper("queen", "start", env=environment)).returncode == 0
        assert (await keeper(*ECHO)).returncode == 0
        rows = json.loads((await keeper("ps", "--json")).stdout)
        hosts = {row["component"]: httpx.URL(row["url"]).host for row in rows}
    finally:
        stopped = await keeper("queen", "stop")
    assert stopped.returncode == 0
    assert hosts == {"queen": "127.0.0.2", "hive": "127.0.0.1", "worker": "127.0.0.1"}
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


async def test_workers_are_started_listed_and_stopped_by_name(home: Home, leaks: LeakCheck) -> None:
    home.config_file.write_text(
        home.config_file.read_text()
        + "[aliases.bee]\nsource = 'smollm2-135m'\nengine = 'echo'\nmax_tokens = 2\n"
        "system = 'Buzz'\nkeep_alive = '1h'\n"
    )
    refused = await keeper("worker", "start", "bee")
    assert refused.returncode == 1
    assert b"hint: rbee-keeper queen start" in refused.stderr
    try:
        assert (await keeper("queen", "start")).returncode == 0
        started = await keeper("worker", "start", "bee")
        assert b"queen: ready after" in started.stderr, started.stderr
        second = await keeper("worker", "start", "bee", "--no-wait", "--keep-alive", "9")
        ids = [one.stdout.decode().strip() for one in (started, second)]
        rows = json.loads((await keeper("worker", "list", "--json")).stdout)
        assert {row["worker_id"]: row["keep_alive"] for row in rows} == {ids[0]: 3600, ids[1]: 9}
        for model, line in [("bee", ()), ("smollm2-135m", ("--engine", "echo"))]:  # of one source
            ask = ("infer", "--model", model, "--prompt", "b", "--max-tokens", "2", "--json")
            answer = json.loads((await keeper(*ask, *line)).stdout)
            assert answer["worker_id"] in ids
            assert answer["text"] == ("Buzz b" if model == "bee" else "b b")
        logs = await keeper("worker", "logs", ids[0], "--lines", "1")
        assert b"llm-worker-rbee" in logs.stdout
        refused = await keeper("worker", "start", "bee", "--engine", "none")
        assert (refused.returncode, refused.stdout) == (1, b"")
        assert b"no engine 'none'" in refused.stderr
        stopped = await keeper("worker", "stop", ids[0], "--json")
        assert json.loads(stopped.stdout)[0]["stopped"]
        pids = {row["worker_id"]: row["pid"] for row in rows}
        assert not guard.start_time(pids[ids[0]])
        again = await keeper("worker", "stop", ids[0])
        assert (again.returncode, again.stdout) == (0, b"")
        assert (await keeper("worker", "stop", "--model", "bee")).returncode == 0
        assert json.loads((await keeper("worker", "list", "--json")).stdout) == []
    finally:
        await keeper("queen", "stop")
    await leaks.wait_clean(1)


async def test_a_hive_is_started_shown_and_stopped_with_its_workers(
    home: Home, leaks: LeakCheck
) -> None:
    refused = await keeper("hive", "start")
    assert b"hint: rbee-keeper queen start" in refused.stderr
    try:
        assert (await keeper("queen", "start")).returncode == 0
        urls = [(await keeper("hive", "start")).stdout for _ in range(2)]
        assert urls[0] == urls[1] != b""
        worker = await keeper("worker", "start", "echo", "--engine", "echo")
        assert worker.returncode == 0, worker.stderr
        hive = json.loads((await keeper("hive", "status", "--json")).stdout)
        assert hive["memory_free"] > 0
        assert hive["disk_free"] > 0
        assert hive["last_seen"] < 8
        below = {child.pid for child in all_below(hive["pid"])}
        assert below
        stopped = await keeper("hive", "stop", "--json")
        assert json.loads(stopped.stdout)["stopped"]
        assert not any(map(guard.start_time, (hive["pid"], *below)))
        assert json.loads((await keeper("ps", "--json")).stdout)[1:] == []
        assert (await keeper("hive", "stop")).returncode == 0
        again = await keeper(*ECHO)
        assert again.returncode == 0  # the next job has a new one started
    finally:
        await keeper("queen", "stop")
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


def test_ctrl_c_is_not_lost_in_the_imports_of_the_keeper() -> None:
    code = (
        "import signal, sys, types; from rbee.__main__ import main; "
        "there = sys.modules['rbee.keeper.app'] = types.ModuleType('app'); "
        "there.main = lambda: print(signal.getsignal(signal.SIGINT).name); main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("SIG_DFL\n", "")
