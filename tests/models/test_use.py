"""What a worker has is not removed: the kernel says so, whoever asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.errors import ConflictError
from rbee.home import Home
from rbee.models.catalog import Catalog, Entry, File, list_models, remove_model
from rbee.models.hold import take_into_use
from rbee.models.locks import lock_file, try_lock
from rbee.models.staging import open_staging, publish
from rbee.models.use import is_used, share, unused
from tests.models.conftest import used

Leftovers = Callable[[], list[Path]]


@attrs.frozen
class Found:
    directory: Path


@attrs.define
class Finder:
    """Find the model ``x``, put on the disk anew at each call in ``puts``."""

    home: Home
    puts: set[int] = attrs.field(factory=lambda: {0})
    calls: int = 0

    async def __call__(self) -> Found:
        if self.calls in self.puts:
            put(self.home)
        self.calls += 1
        return Found(self.home.models / "x")


def put(home: Home) -> None:
    (home.models / "x").mkdir()
    (home.models / "x" / "f").write_text("12")
    Catalog(home.models).save("x", Entry("pypi:x", "pypi", "1", (File("f", 2),), "float32"))


async def test_a_model_is_in_use_until_its_worker_ends(home: Home, leftovers: Leftovers) -> None:
    with ExitStack() as one, ExitStack() as two:
        await take_into_use(Finder(home), home.models, one)
        await take_into_use(Finder(home, set()), home.models, two)
        assert is_used(home.models, "x")
        one.close()
        assert is_used(home.models, "x")
        with pytest.raises(ConflictError, match="in use"):
            remove_model(home, "x")
    assert not is_used(home.models, "x")
    assert leftovers() == []
    remove_model(home, "x")


async def test_a_use_is_remembered_at_its_begin_and_at_its_end(home: Home) -> None:
    record = home.models / "x.json"
    with ExitStack() as held:
        await take_into_use(Finder(home), home.models, held)
        os.utime(record, (1, 1))
        with ExitStack() as other:
            await take_into_use(Finder(home, set()), home.models, other)
            assert record.stat().st_mtime > 1
        os.utime(record, (1, 1))
    assert record.stat().st_mtime > 1


async def test_what_was_removed_before_it_was_held_is_found_again(home: Home) -> None:
    find = Finder(home, puts={1})  # at the first call it was there, and is gone already
    with ExitStack() as held:
        assert await take_into_use(find, home.models, held) == Found(home.models / "x")
        assert is_used(home.models, "x")
    assert find.calls == 2


async def test_what_is_removed_again_and_again_is_given_up(home: Home) -> None:
    with ExitStack() as held, pytest.raises(ConflictError, match="was removed"):
        await take_into_use(Finder(home, puts=set()), home.models, held)


async def test_a_model_elsewhere_is_its_owners_to_keep(home: Home, tmp_path: Path) -> None:
    async def find() -> Found:
        return Found(tmp_path / "mine")

    with ExitStack() as held:
        await take_into_use(find, home.models, held)
    assert list(home.models.iterdir()) == []


async def test_a_catalog_that_cannot_be_written_is_used_without_a_lock(tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    with ExitStack() as held:
        await share(tmp_path / "models", "x", held)
    assert not is_used(tmp_path / "models", "x")


async def test_a_worker_waits_while_its_model_is_being_removed(home: Home) -> None:
    with trio.fail_after(10), ExitStack() as held:
        async with trio.open_nursery() as nursery:
            with unused(home.models, "x"):
                nursery.start_soon(share, home.models, "x", held)
                await wait_all_tasks_blocked()
                assert not held._exit_callbacks
        assert is_used(home.models, "x")


def test_who_removes_waits_for_one_who_only_looks(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lock_file(home.models, ".in-use", "x")
    looking = try_lock(path)
    assert looking is not None
    monkeypatch.setattr("time.sleep", lambda seconds: os.close(looking))
    with unused(home.models, "x"):
        pass


async def test_a_directory_in_use_is_not_replaced(home: Home) -> None:
    put(home)
    with used(home, "x"):
        async with open_staging(home.models, "x") as staging:
            (staging / "new").mkdir()
            with pytest.raises(ConflictError, match="in use"):
                await publish(staging / "new", home.models / "x")
    assert (home.models / "x" / "f").read_text() == "12"


@pytest.mark.slow
async def test_a_killed_holder_holds_nothing_and_no_child_of_it_does(home: Home) -> None:
    put(home)
    program = (
        "import pathlib, subprocess, sys, trio\n"
        "from contextlib import ExitStack\n"
        "from rbee.models.use import share\n"
        "held = ExitStack()\n"
        "trio.run(share, pathlib.Path(sys.argv[1]), 'x', held)\n"
        "child = subprocess.Popen(['sleep', '60'], close_fds=False)\n"
        "print(child.pid, flush=True); input()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(home.models)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout
        child = os.pidfd_open(int(await trio.to_thread.run_sync(holder.stdout.readline)))
        try:
            assert is_used(home.models, "x")
            holder.kill()
            holder.wait()
            with trio.fail_after(1):  # under load the kernel puts a file some 0.7 ms later
                while is_used(home.models, "x"):  # noqa: ASYNC110 - the kernel has no event for it
                    await trio.sleep(0.001)
            remove_model(home, "x")
        finally:
            holder.kill()
            signal.pidfd_send_signal(child, signal.SIGKILL)
            os.close(child)
    assert list_models(home) == []
