from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from rbee.errors import ConflictError, MachineError
from rbee.home import Home
from rbee.models.staging import lock_now, open_lock, open_staging, publish

Leftovers = Callable[[], list[Path]]


async def test_one_at_a_time_holds_the_lock(home: Home, leftovers: Leftovers) -> None:
    told: list[str] = []
    inside = 0

    async def hold() -> None:
        nonlocal inside
        async with open_lock(home.models, "x", waiting=lambda: told.append("waiting")):
            inside += 1
            assert inside == 1
            await trio.testing.wait_all_tasks_blocked()
            inside -= 1

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(hold)
    assert told == ["waiting", "waiting"]
    assert leftovers() == []


async def test_waiting_for_the_lock_can_be_cancelled(home: Home, leftovers: Leftovers) -> None:
    with lock_now(home.models, "x"):
        with trio.move_on_after(0) as scope:
            async with open_lock(home.models, "x"):
                pytest.fail("two held it")
        assert scope.cancelled_caught
    assert leftovers() == []


def test_what_is_being_fetched_is_not_locked_at_once(home: Home) -> None:
    busy = pytest.raises(ConflictError, match="being fetched")
    with lock_now(home.models, "x"), busy, lock_now(home.models, "x"):
        pytest.fail("two held it")
    with lock_now(home.models, "x"), lock_now(home.models, "y"):
        pass


@pytest.mark.slow
async def test_the_lock_of_a_killed_process_is_free(home: Home) -> None:
    program = (
        "import sys, pathlib; from rbee.models.staging import lock_now\n"
        "with lock_now(pathlib.Path(sys.argv[1]), 'x'): print('held', flush=True); input()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(home.models)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        try:
            assert child.stdout
            assert await trio.to_thread.run_sync(child.stdout.readline) == b"held\n"
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_take, home.models, child.kill)
        finally:
            child.kill()


async def _take(models: Path, kill: Callable[[], None]) -> None:
    async with open_lock(models, "x", waiting=kill):
        pass


async def test_a_staging_directory_goes_with_its_body(home: Home, leftovers: Leftovers) -> None:
    with trio.CancelScope() as scope:
        async with open_staging(home.models, "x") as staging:
            (staging / "half").write_text("half")
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert list(home.models.iterdir()) == []


async def test_staging_removes_what_a_killed_one_left_and_no_other(home: Home) -> None:
    for name in ("x.0123abcd", "y.0123abcd"):
        (home.models / ".staging" / name).mkdir(parents=True)
    async with open_staging(home.models, "x"):
        pass
    assert [path.name for path in home.models.glob(".staging/*")] == ["y.0123abcd"]


async def test_publishing_replaces_an_unusable_directory(home: Home) -> None:
    target = home.models / "x"
    target.mkdir()
    (target / "broken").touch()
    async with open_staging(home.models, "x") as staging:
        (staging / "new").mkdir()
        (staging / "new" / "good").write_text("good")
        await publish(staging / "new", target)
    assert [path.name for path in target.iterdir()] == ["good"]
    assert [path for path in home.models.iterdir() if path.name[0] != "."] == [target]


async def test_a_home_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    with pytest.raises(MachineError, match="needs a writable home"):
        async with open_lock(tmp_path / "models", "x"):
            pytest.fail("there is no such directory")


async def test_the_staging_of_another_model_whose_name_begins_the_same_stays(home: Home) -> None:
    async with open_staging(home.models, "x--1.5") as other, open_staging(home.models, "x--1"):
        assert other.is_dir()
