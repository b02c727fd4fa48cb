"""``worker start|stop|logs`` against a small queen."""

from __future__ import annotations

import json

import attrs
import pytest

from rbee.errors import RbeeError, UnavailableError
from rbee.home import Home
from rbee.keeper.app import of_worker, run_line
from rbee.keeper.flags import LogFlags, TailFlags, WorkerStartFlags, WorkerStopFlags
from rbee.keeper.workers import start_request, start_worker, stop_workers
from rbee.wire.messages import Error, StartWorker
from tests.keeper.fake_queen import WORKER, FakeQueen, open_fake

Captured = pytest.CaptureFixture[str]


def several() -> FakeQueen:
    """Make a queen with three workers, two of one model."""
    workers = [
        attrs.evolve(WORKER, worker_id="worker-1", model="hf:a/b", served_names=("hf:a/b", "bee")),
        attrs.evolve(WORKER, worker_id="worker-2", model="pypi:other"),
        attrs.evolve(WORKER, worker_id="worker-3", model="bee"),
    ]
    return FakeQueen(workers={worker.worker_id: worker for worker in workers})


async def stop(flags: WorkerStopFlags, *ids: str) -> None:
    await stop_workers(flags, ids)


@pytest.mark.parametrize("wait", [True, False])
async def test_a_worker_is_started_and_its_id_printed(
    home: Home, capfd: Captured, wait: bool
) -> None:
    flags = WorkerStartFlags(wait=wait, kv_cache="1G", keep_alive="-1", engine_arg=("a_b=1",))
    request = start_request(flags, "bee")
    async with open_fake(home=home) as (queen, _):
        await start_worker(flags, request)
    out, err = capfd.readouterr()
    assert out == "worker-2\n"
    assert err == ("hive: load a model\n" if wait else "")
    (start,) = queen.starts
    assert start == StartWorker(
        "bee", kv_cache_bytes=1 << 30, keep_alive=-1.0, engine_args={"a-b": "1"}
    )


@pytest.mark.parametrize("as_json", [False, True])
async def test_where_a_worker_would_be_started_is_told_without_starting_it(
    home: Home, capfd: Captured, as_json: bool
) -> None:
    flags = WorkerStartFlags(explain=True, json=as_json)
    async with open_fake(home=home) as (queen, _):
        await start_worker(flags, start_request(flags, "bee"))
        assert queen.starts == []
    out, err = capfd.readouterr()
    assert err == ""
    if as_json:
        assert json.loads(out)[0] == {
            "node": "mac", "suits": "on_disk", "why": "bee is on its disk",
        }  # fmt: skip
    else:
        assert [line.split(maxsplit=2) for line in out.splitlines()] == [
            ["NODE", "SUITS", "WHY"],
            ["mac", "on_disk", "bee is on its disk"],
            ["localhost", "no", "no cuda device 0 (it has none)"],
        ]


async def test_a_worker_that_does_not_become_ready_is_an_error(home: Home) -> None:
    queen = FakeQueen(failure=Error("insufficient", "no room", "buy some"))
    async with open_fake(queen, home):
        with pytest.raises(Exception, match="no room") as caught:
            await start_worker(WorkerStartFlags(), start_request(WorkerStartFlags(), "bee"))
    assert getattr(caught.value, "hint", "") == "buy some"


async def test_a_worker_needs_a_queen_that_stays(home: Home, capfd: Captured) -> None:
    flags = WorkerStartFlags()
    with pytest.raises(UnavailableError, match="no queen running") as caught:
        await start_worker(flags, start_request(flags, "bee"))
    assert caught.value.hint == "rbee-keeper queen start"
    async with open_fake(FakeQueen(owner="keeper-1"), home):
        await start_worker(flags, start_request(flags, "bee"))
    assert "ends with the command that owns it (keeper-1)" in capfd.readouterr().err


def test_a_start_that_cannot_work_is_refused_before_anything(home: Home, capfd: Captured) -> None:
    assert run_line(["worker", "start", "bee", "--kv-cache", "much"]) == 1
    assert "is not a size" in capfd.readouterr().err


async def test_stopping_again_is_fine(home: Home, capfd: Captured) -> None:
    async with open_fake(several(), home) as (queen, _):
        await stop(WorkerStopFlags(json=True), "worker-2", "worker-9", "worker-2")
        assert set(queen.workers) == {"worker-1", "worker-3"}
    out, err = capfd.readouterr()
    told = {row["worker_id"]: row["stopped"] for row in json.loads(out)}
    assert told == {"worker-2": True, "worker-9": False}
    assert err == "worker-9 does not run\n"


async def test_one_that_does_not_end_is_an_error_and_the_others_are_stopped(
    home: Home, capfd: Captured
) -> None:
    async with open_fake(attrs.evolve(several(), stuck={"worker-2"}), home) as (queen, _):
        with pytest.raises(RbeeError, match="does not end") as caught:
            await stop(WorkerStopFlags(all=True, json=True))
        assert queen.workers == {}
    assert (caught.value.code, caught.value.exit_code) == ("stuck", 1)
    told = {row["worker_id"]: row["stopped"] for row in json.loads(capfd.readouterr().out)}
    assert told == {"worker-1": True, "worker-2": False, "worker-3": True}


@pytest.mark.parametrize("name", ["bee", "hf:a/b", "a/b"])
async def test_all_workers_of_a_model_are_stopped_by_any_of_its_names(
    home: Home, capfd: Captured, name: str
) -> None:
    home.config_file.write_text("[aliases]\nbee = 'hf:a/b'\n")
    async with open_fake(several(), home) as (queen, _):
        await stop(WorkerStopFlags(model=name))
        assert set(queen.workers) == {"worker-2"}
        await stop(WorkerStopFlags(model=name))
    out, err = capfd.readouterr()
    assert "worker-1 stopped in 0." in out
    assert err == "no such worker\n"


async def test_all_workers_are_stopped_when_asked_to(home: Home, capfd: Captured) -> None:
    async with open_fake(several(), home) as (queen, _):
        await stop(WorkerStopFlags(all=True))
        assert queen.workers == {}
    assert len(capfd.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("line", [[], ["w", "--all"], ["--all", "--model", "m"]])
def test_what_to_stop_is_said_once_and_never_inherited(
    home: Home, capfd: Captured, monkeypatch: pytest.MonkeyPatch, line: list[str]
) -> None:
    monkeypatch.setenv("RBEE_MODEL", "m")
    monkeypatch.setenv("RBEE_ALL", "1")
    home.config_file.write_text("model = 'm'\n")
    assert run_line(["worker", "stop", *line]) == 2
    assert "needs one of" in capfd.readouterr().err


def test_without_a_queen_nothing_is_left_to_stop(home: Home, capfd: Captured) -> None:
    assert run_line(["worker", "stop", "--all"]) == 0
    assert capfd.readouterr().err == "no queen running\n"


def test_a_workers_logs_are_those_of_the_logs_command(home: Home, capfd: Captured) -> None:
    assert of_worker(TailFlags(lines=3, follow=True, json=True, node="mac"), "w") == LogFlags(
        lines=3, follow=True, json=True, node="mac", worker="w"
    )
    home.log_file("worker-1").write_text("a\nb\nc\n")
    assert run_line(["worker", "logs", "worker-1", "--lines", "2"]) == 0
    assert capfd.readouterr().out == "b\nc\n"
    assert run_line(["worker", "logs", "worker-2"]) == 1
    assert "there are: worker-1" in capfd.readouterr().err
