from __future__ import annotations

import json
import os
from typing import Any

import attrs
import pytest

from rbee.home import Home
from rbee.keeper import listing
from rbee.keeper.flags import QueenFlags
from rbee.wire.messages import ErrorDetail, WorkerInfo
from tests.keeper.fake_queen import HIVE, WORKER, FakeQueen, open_fake

NOBODY_KNOWS = ErrorDetail("unverified", "who knows")
LISTS = (listing.list_workers, listing.list_processes)


@pytest.mark.parametrize("command", [*LISTS, listing.show_status, listing.show_queen])
async def test_without_a_queen_lists_are_empty_and_nothing_fails(
    home: Home, capfd: pytest.CaptureFixture[str], command: Any
) -> None:
    await command(QueenFlags(json=True))
    out, err = capfd.readouterr()
    assert err == "no queen running\n"
    assert json.loads(out) == [] if command in LISTS else json.loads(out)


async def test_processes_are_listed_by_component(
    home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    async with open_fake(home=home):
        await listing.list_processes(QueenFlags())
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["COMPONENT", "queen", "hive", "worker"]
    assert str(os.getpid()) in lines[1]


async def test_workers_are_listed_with_their_models(
    home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    async with open_fake(home=home):
        await listing.list_workers(QueenFlags(json=True))
    (worker,) = json.loads(capfd.readouterr().out)
    assert (worker["worker_id"], worker["model"], worker["state"]) == ("worker-1", "echo", "ready")


@pytest.mark.parametrize(
    ("info", "told"),
    [
        (
            WorkerInfo("w", "m", "loading", progress="weights", share=0.425),
            "loading (weights 42 %)",
        ),
        (WorkerInfo("w", "m", "loading", progress="KV cache"), "loading (KV cache)"),
        (WorkerInfo("w", "m", "ready"), "ready"),
    ],
)
def test_the_state_of_a_loading_worker_tells_how_far_it_is(info: WorkerInfo, told: str) -> None:
    assert listing.state_in_words(info) == told


async def test_the_status_sums_up(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    home.config_file.write_text("[aliases]\nx = 'pypi:y'\n")
    async with open_fake(home=home) as (_, url):
        await listing.show_status(QueenFlags())
    out = capfd.readouterr().out
    assert f"ready at {url}" in out
    assert "workers: 1" in out
    assert "aliases: 1" in out


async def test_a_queen_of_another_version_is_shown(
    home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    async with open_fake(FakeQueen(version="0.0.7"), home):
        await listing.show_queen(QueenFlags(json=True))
    assert json.loads(capfd.readouterr().out)["version"] == "0.0.7"


async def test_what_is_left_of_a_worker_or_a_hive_is_told(
    home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    process = {"pid": 7, "name": "VLLM::EngineCore", "state": "D", "place": "nv", "memory": 1 << 30}
    error = ErrorDetail("stuck", "it does not end", details={"processes": [process]})
    stuck = attrs.evolve(WORKER, worker_id="worker-2", state="stuck", error=error)
    unseen = attrs.evolve(stuck, worker_id="worker-3", state="unverified", error=NOBODY_KNOWS)
    lost = attrs.evolve(HIVE, node="mac", state="unverified", left="mac does not tell")
    queen = FakeQueen()
    queen.workers |= {"worker-2": stuck, "worker-3": unseen}
    queen.hives["mac"] = lost
    async with open_fake(queen, home):
        await listing.show_status(QueenFlags())
        await listing.list_workers(QueenFlags())
        told = capfd.readouterr().out
        await listing.show_status(QueenFlags(json=True))
        facts = json.loads(capfd.readouterr().out)
    assert "worker-2 on localhost is stuck: it does not end" in told
    assert "stuck (VLLM::EngineCore [7] (state D in nv, 1.0 GiB))" in told
    assert "unverified (who knows)" in told
    assert "mac unverified (mac does not tell)" in told
    assert [(one["worker_id"], one["processes"]) for one in facts["left"]] == [
        ("worker-2", [process]), ("worker-3", []),
    ]  # fmt: skip
