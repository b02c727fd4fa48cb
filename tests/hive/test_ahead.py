"""A zygote forked off its hive before that serves: a zygote like any other, or none."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from rbee.hive import ahead
from rbee.hive.ahead import fork_ahead
from rbee.model import Grace, WorkerConfig, WorkerId, WorkerSpec
from rbee.testing.processes import LeakCheck
from rbee.wire import codec

HIVE = """
import json, os, sys, trio
from pathlib import Path
from rbee import guard
from rbee.hive.ahead import fork_ahead
from rbee.hive.launch import fork_or_exec
from rbee.hive.zygotes import Zygotes
from rbee.model import WorkerConfig
from rbee.testing.processes import count_titles, title_of
from rbee.wire import codec

config = codec.loads(sys.argv[1], WorkerConfig)
logs = Path(sys.argv[2])
listener = os.open("/dev/zero", os.O_RDONLY)  # what no other process is to hold
ahead = fork_ahead("echo", logs / "zygote-echo.log")

async def main():
    zygotes = Zygotes(lambda name: logs / f"{name}.log", {}, ahead)
    async with zygotes.open():
        zygote = await zygotes.get("echo")
        await zygote.ready.wait()
        pid = ahead["echo"].pid
        held = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        async with fork_or_exec(zygotes.get)(config, logs / "worker.log") as process:
            while not guard.children(process.pid):  # a guard that has begun cleans
                await trio.sleep(0.01)
            print(json.dumps({
                "pid": pid,
                "title": title_of(pid),
                "sid": os.getsid(pid),
                "threads": len(os.listdir(f"/proc/{pid}/task")),
                "holds_ours": "/dev/zero" in held,
                "worker_below": process.pid in guard.children(pid),
            }), flush=True)
            if sys.argv[3] == "wait":
                await trio.sleep_forever()
        os.kill(pid, 9)
        while not zygote.gone:
            await trio.sleep(0.01)
        async with fork_or_exec(zygotes.get)(config, logs / "worker.log"):
            while "llm-worker-rbee" not in (titles := count_titles(os.environ["RBEE_NONCE"])):
                await trio.sleep(0.01)  # it begins with the title of its guard
            print(json.dumps(titles), flush=True)

trio.run(main)
"""


def start_hive(leaks: LeakCheck, how: str) -> subprocess.Popen[str]:
    config = codec.dumps(
        WorkerConfig(
            WorkerSpec(WorkerId("worker-1"), "words", engine="echo"),
            run_dir=str(leaks.home.run / "worker-1"), token="secret", port=0,
            grace=Grace(worker=0.5, worker_guard=1.0),
        )
    ).decode()  # fmt: skip
    leaks.home.logs.mkdir(exist_ok=True)
    argv = [sys.executable, "-c", HIVE, config, str(leaks.home.logs), how]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_it_is_a_zygote_as_if_executed_and_the_next_one_is(leaks: LeakCheck) -> None:
    with start_hive(leaks, "go on") as hive:
        assert hive.stdout is not None
        first = json.loads(hive.stdout.readline())
        assert first.pop("pid") == first.pop("sid")
        assert first == {
            "title": "rbee-zygote", "threads": 1, "holds_ours": False, "worker_below": True,
        }  # fmt: skip
        titles = json.loads(hive.stdout.readline())
        assert titles["rbee-zygote"] == titles["rbee-guard"] == 1
        assert hive.wait(20) == 0
    assert leaks.find() == []


@pytest.mark.slow
async def test_it_dies_with_its_hive(leaks: LeakCheck) -> None:
    with start_hive(leaks, "wait") as hive:
        assert hive.stdout is not None
        leaks.tree.refresh(hive.pid)
        await trio.to_thread.run_sync(hive.stdout.readline)
        leaks.tree.refresh(hive.pid)
        hive.kill()
    await leaks.wait_clean(5)


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "zygote.log"


@pytest.mark.parametrize("engine", ["", "vllm", "no-such-engine"])
def test_there_is_none_of_an_engine_that_needs_a_model_or_is_not_there(
    engine: str, log_file: Path
) -> None:
    assert fork_ahead(engine, log_file) == {}


def test_there_is_none_with_a_token_of_a_hub_in_its_environment(
    log_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    assert fork_ahead("echo", log_file) == {}


def _broken(engine: str) -> Any:
    raise ImportError("no module of it")


def test_there_is_none_of_an_engine_that_cannot_be_imported(
    log_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead.zygote, "refuse_unsafe_fork", lambda: None)
    monkeypatch.setattr(ahead, "engine_kind", _broken)
    assert ahead.fork_ahead("echo", log_file) == {}


def test_there_is_none_where_nothing_can_be_forked(
    log_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(ahead.zygote, "refuse_unsafe_fork", lambda: None)
    monkeypatch.setattr(ahead.os, "fork", refuse)
    assert ahead.fork_ahead("echo", log_file) == {}  # what it opened is closed: warnings are errors


def test_threads_of_the_engines_own_module_are_seen(
    log_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)

    def engine_kind(engine: str) -> SimpleNamespace:
        thread.start()
        return SimpleNamespace(needs_model=False)

    monkeypatch.setattr(ahead, "engine_kind", engine_kind)
    try:
        assert ahead.fork_ahead("echo", log_file) == {}
    finally:
        stop.set()
        thread.join()


def test_there_is_none_of_a_process_with_threads(log_file: Path) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert fork_ahead("echo", log_file) == {}
    finally:
        stop.set()
        thread.join()
