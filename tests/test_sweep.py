"""The sweep ends exactly what a journal without guards names, and what lives below that."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rbee import guard, sweep
from rbee.errors import MachineError
from rbee.home import Home
from rbee.ssh import boot
from rbee.sweep import Identity, abandoned, claim, records, retire, sweep_abandoned
from rbee.testing.processes import LeakCheck
from tests.journal import DEAD, planted, process, write
from tests.trees import NAP, STUBBORN, alive, code, guarded, kill, wait_for

slow = pytest.mark.slow


@pytest.fixture
def run_dir(home: Home) -> Path:
    path = home.run / "queen-1" / "hive-1"
    path.mkdir(parents=True)
    return path


# ending ---------------------------------------------------------------------------------------
@slow
async def test_what_an_abandoned_directory_names_is_ended_and_the_directory_removed(
    home: Home, run_dir: Path
) -> None:
    with planted() as one, planted() as two, planted() as other:
        write(run_dir, child=process(one), descendants=[process(two), DEAD])
        assert await sweep_abandoned(home.run) == 2
        assert (alive(one), alive(two), alive(other)) == (False, False, True)
    assert list(home.run.iterdir()) == []


async def test_nobody_sweeps_himself_when_his_guards_have_died(home: Home, run_dir: Path) -> None:
    write(run_dir, child=process(os.getpid()))
    assert abandoned(run_dir)
    assert await sweep_abandoned(home.run, run_dir) == 0
    assert run_dir.exists()  # the next daemon's to remove
    assert await sweep_abandoned(home.run) == 0  # nor by mistake: we would be stopped for ever
    assert not run_dir.exists()


@slow
async def test_what_was_forked_after_the_last_record_is_ended_too(run_dir: Path) -> None:
    tree = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", {STUBBORN!r}], stdout=subprocess.PIPE,
                         start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen(code(tree), stdout=pipe, stdin=pipe) as parent:
        young = int(parent.stdout.readline())
        write(run_dir, child=process(parent.pid))
        assert await sweep.sweep(run_dir) == 2
        assert not alive(young)


@slow
async def test_a_process_that_ends_by_itself_in_time_is_not_killed(run_dir: Path) -> None:
    with planted("print(flush=True); import time; time.sleep(0.3)") as child:
        write(run_dir, child=process(child))
        assert await sweep.sweep(run_dir, patience=5) == 0
    assert not run_dir.exists()


@slow
async def test_a_look_alike_is_not_touched(home: Home, nonce: str) -> None:
    """Same command line, same nonce, even the same pid: only the start time tells."""
    directory = home.run / "hive-1"
    directory.mkdir()
    with planted() as child:
        write(directory, nonce=nonce, child={"pid": child, "start": guard.start_time(child) - 1})
        assert await sweep_abandoned(home.run) == 0
        assert alive(child)
    assert not directory.exists()


@slow
async def test_entries_of_another_boot_are_only_removed(home: Home, run_dir: Path) -> None:
    with planted() as child:
        write(run_dir, boot_id="another", child=process(child), guard=process(child))
        assert await sweep_abandoned(home.run) == 0
        assert alive(child)
    assert list(home.run.iterdir()) == []


@slow
async def test_a_process_that_cannot_be_ended_keeps_its_journal(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planted() as child:
        path = write(run_dir, child=process(child))
        monkeypatch.setattr(Identity, "signal", lambda self, number: False)
        with pytest.raises(MachineError, match=str(child)) as caught:
            await sweep.sweep(run_dir, within=0.1)
        assert caught.value.code == "stuck"
        assert path.exists()
        monkeypatch.undo()
        assert await sweep.sweep(run_dir) == 1
    assert not run_dir.exists()


async def test_what_proc_does_not_show_is_not_taken_for_gone(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(run_dir, child=DEAD)
    monkeypatch.setattr(guard, "is_hidden", lambda pid: pid == DEAD["pid"])
    with pytest.raises(MachineError, match=str(DEAD["pid"])) as caught:
        await sweep.sweep(run_dir)
    assert caught.value.code == "unverified"
    assert path.exists()


@slow
async def test_a_daemon_that_ends_leaves_its_directory_while_it_names_what_lives(
    home: Home,
) -> None:
    directory = home.run / "queen-1"
    claim(directory)
    with planted() as child:
        write(directory, child=process(child))
        retire(directory)
        assert directory.exists()
        assert alive(child)
    retire(directory)
    assert not directory.exists()


# what it leaves alone -------------------------------------------------------------------------
@slow
async def test_a_directory_with_a_living_guard_is_untouched(leaks: LeakCheck) -> None:
    run_dir = leaks.home.run / "hive-1" / "worker-1"
    run_dir.mkdir(parents=True)
    with guarded(code("print(1, flush=True)", NAP), leaks, record=str(run_dir)) as one:
        one.hear()
        wait_for(lambda: list(records(run_dir)))
        assert not abandoned(run_dir.parent)
        assert await sweep_abandoned(leaks.home.run) == 0
        assert alive(one.child)
        child = one.child
        kill(one.pid)
        wait_for(lambda: not alive(one.pid))
        assert await sweep_abandoned(leaks.home.run) == 1
        assert not alive(child)


@slow
async def test_a_directory_of_a_living_owner_is_untouched(home: Home) -> None:
    directory = home.run / "hive-1"
    claim(directory)
    with planted() as child:
        write(directory, child=process(child))
        assert abandoned(directory)
        assert await sweep_abandoned(home.run) == 0
        assert alive(child)
        owner = directory / "owner"
        owner.write_text(owner.read_text().replace(str(os.getpid()), "4194305"))
        assert await sweep_abandoned(home.run) == 1


def test_a_claimed_directory_is_private_and_names_this_process(home: Home) -> None:
    directory = home.run / "queen-1" / "hive-1"
    claim(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    pid = os.getpid()
    assert (directory / "owner").read_text().split() == [
        guard.boot_id(), str(pid), str(guard.start_time(pid)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "make", [claim, lambda directory: boot.make_run("/", str(directory))], ids=["here", "on a node"]
)
def test_a_claim_that_fails_leaves_nothing(home: Home, make: Callable[[Path], object]) -> None:
    (home.run / "hive-1" / "in-the-way").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        make(home.run / "hive-1")
    assert os.listdir(home.run) == ["hive-1"]


@pytest.mark.parametrize("text", ["", "one", "a b c", f"{guard.boot_id()} x y", "\udcff"])
async def test_a_damaged_owner_is_none(home: Home, text: str) -> None:
    directory = home.run / "hive-1"
    directory.mkdir()
    (directory / "owner").write_bytes(text.encode(errors="surrogateescape"))
    assert await sweep_abandoned(home.run) == 0
    assert not directory.exists()


async def test_a_directory_that_is_just_being_claimed_is_left_until_it_is_old(home: Home) -> None:
    directory = home.run / ".hive-1"
    directory.mkdir()
    await sweep_abandoned(home.run)
    assert directory.exists()
    os.utime(directory, (0, 0))
    await sweep_abandoned(home.run)
    assert not directory.exists()


async def test_files_and_locks_of_a_run_directory_stay(home: Home) -> None:
    for name in ("queen.lock", "queen.json"):
        (home.run / name).touch()
    await sweep_abandoned(home.run)
    assert len(list(home.run.iterdir())) == 2


# damage and races -----------------------------------------------------------------------------
DAMAGED = ("", "{", "[]", "5", '{"boot_id": "BOOT"}', '{"boot_id": "BOOT", "guard": 5}', "\udcff")


@slow
async def test_damaged_entries_are_skipped(run_dir: Path) -> None:
    for number, text in enumerate(DAMAGED, 100):
        data = text.replace("BOOT", guard.boot_id()).encode(errors="surrogateescape")
        (run_dir / f"guard-{number}.json").write_bytes(data)
    write(run_dir, shm=[5])
    (run_dir / "guard-7.json~").write_text("half")
    with planted() as child:
        write(run_dir, child=process(child))
        assert [record.child.pid for record in records(run_dir)] == [child]
        assert await sweep.sweep(run_dir) == 1
    assert not run_dir.exists()


async def test_a_directory_that_is_gone_is_swept_already(home: Home) -> None:
    assert await sweep.sweep(home.run / "never there") == 0
    assert list(records(home.run / "never there")) == []


def test_a_directory_may_go_while_its_records_are_read(run_dir: Path) -> None:
    (run_dir / "deep").mkdir()
    write(run_dir)
    write(run_dir / "deep")
    found = []
    for record in records(run_dir.parent):
        found.append(record)
        guard.remove_tree(str(run_dir.parent))
    assert len(found) == 1


# what the dead left on disk -------------------------------------------------------------------
async def test_noted_shared_memory_is_unlinked_and_no_other_file(run_dir: Path) -> None:
    segment, data = Path(f"/dev/shm/psm_{os.getpid()}"), Path(f"/dev/shm/data-{os.getpid()}")
    for path in (segment, data):
        path.touch()
    write(run_dir, shm=[str(segment), str(data), "/dev/shm/../tmp/psm_x", "/dev/shm/psm_gone"])
    await sweep.sweep(run_dir)
    assert (segment.exists(), data.exists()) == (False, True)
    data.unlink()


@slow
async def test_shared_memory_that_no_record_tells_of_is_unlinked(run_dir: Path) -> None:
    segment = Path(f"/dev/shm/psm_{os.getpid()}")
    source = f"""
import mmap, time
with open({str(segment)!r}, "w+b") as file:
    file.truncate(4096)
    held = mmap.mmap(file.fileno(), 4096)
print(flush=True)
time.sleep(60)
"""
    with planted(source) as child:
        write(run_dir, child=process(child))
        await sweep.sweep(run_dir)
    assert not segment.exists()


async def test_the_run_file_of_the_dead_is_removed(home: Home, run_dir: Path) -> None:
    home.hive_file.write_text(json.dumps({"pid": DEAD["pid"]}))
    home.queen_file.write_text('{"pid": 1}')
    write(run_dir, run_file=str(home.hive_file))
    write(run_dir, run_file=str(home.queen_file))
    await sweep.sweep(run_dir)
    assert (home.hive_file.exists(), home.queen_file.exists()) == (False, True)
