"""What does not end is not told to have ended: with a process that really cannot be killed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from signal import SIGKILL
from typing import Any

import pytest

from rbee.guard import children, send_signal, start_time
from rbee.home import Home
from rbee.sweep import records
from rbee.testing.processes import LeakCheck, read_stat, title_of
from tests.cascade.keeper import run
from tests.trees import alive, kill
from tests.unkillable import unkillable

pytestmark = pytest.mark.slow


@pytest.fixture
def queen(home: Home, leaks: LeakCheck) -> Iterator[None]:
    assert run("queen", "start", "--port", "0").code == 0
    yield
    run("queen", "stop")
    leaks.wait_clean_sync(10)


def told(*line: str) -> Any:
    return json.loads(run(*line, "--json").out)


def engine_of(worker: dict[str, Any]) -> int:
    (pid,) = (pid for pid in children(worker["pid"]) if title_of(pid) == "echo-engine")
    return pid


def parent_of(pid: int) -> int:
    stat = read_stat(pid)
    assert stat is not None
    return stat.parent


def until(found: Callable[[], Any]) -> Any:
    limit = time.monotonic() + 20
    while not (value := found()):
        assert time.monotonic() < limit, "it did not happen in time"
    return value


def test_a_worker_is_stuck_until_its_last_process_has_gone(queen: None) -> None:
    name = run("worker", "start", "echo", "--engine", "echo").out.strip()
    (worker,) = told("worker", "list")
    engine = engine_of(worker)
    with unkillable(engine):
        kill(parent_of(worker["pid"]))  # its guard: all else than the engine has gone at once
        (left,) = until(lambda: told("status")["left"])
        assert (left["worker_id"], left["state"]) == (name, "stuck")
        (process,) = left["processes"]
        assert (process["pid"], process["name"]) == (engine, "echo-engine")
        assert process["memory"] > 0
        assert f"stuck (echo-engine [{engine}] (state t" in run("worker", "list").out
        assert [one["state"] for one in told("ps")] == ["ready", "ready", "stuck"]
        stopped = run("worker", "stop", name)
        stopped.check_refusal("not end, not even killed", f"echo-engine [{engine}] (state t")
    until(lambda: not told("worker", "list"))
    assert told("status")["left"] == []


@pytest.mark.parametrize("hive", ["lives", "gone"])
def test_reap_tells_of_what_has_lost_its_guard(queen: None, home: Home, hive: str) -> None:
    run("worker", "start", "echo", "--engine", "echo")
    (worker,) = told("worker", "list")
    engine = engine_of(worker)
    chain = [parent_of(worker["pid"])]  # its guard, zygote, hive, guards B and A, the queen
    while title_of(chain[-1]) != "queen-rbee":
        chain.append(parent_of(chain[-1]))
    until(lambda: engine in {one.pid for record in records(home.run) for one in record.members})
    with unkillable(engine):
        for pid in chain[-2::-1] if hive == "gone" else chain[:1]:  # from above: none cleans
            send_signal(pid, start_time(pid), SIGKILL)
        until(lambda: not any(map(alive, (chain[0], worker["pid"]))))
        (found,) = until(lambda: told("reap", "--dry-run"))
        assert (found["pid"], found["name"], found["outcome"]) == (engine, "echo-engine", "found")
        done = run("reap", "--json")
        (row,) = json.loads(done.out)
        assert (done.code, row["pid"], row["outcome"]) == (1, engine, "stuck")
        assert f"echo-engine [{engine}] (state t" in done.err
    until(lambda: told("reap", "--dry-run") == [])
