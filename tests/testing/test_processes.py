"""The leak check must turn red for whatever can be left behind, and green once that is gone."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from rbee.home import Home
from rbee.testing import processes
from rbee.testing.processes import LeakCheck, LeakError, Tree

pytestmark = [pytest.mark.slow, pytest.mark.alone]

NAP = "import time; time.sleep(60)"
TITLED = "import setproctitle as s, time; s.setproctitle({title!r}); print(flush=True); " + NAP
FORKED = """
import os, sys, time, setproctitle
if os.fork():
    sys.exit(os.wait()[1])
os.setsid()
if pid := os.fork():
    print(pid, flush=True)
    os._exit(0)
os.close(1)
time.sleep(60)
"""
LISTENING = """
import socket, time
s = socket.create_server(("127.0.0.1", 0))
print(s.getsockname()[1], flush=True)
time.sleep(60)
"""
UNREAPED = """
import os, time
if (pid := os.fork()) == 0:
    os._exit(0)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
print(pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def planted_orphans_end(leaks: LeakCheck) -> Iterator[None]:
    """End what these tests plant so well that the check can only guess whose it is."""
    yield
    leaks.kill(guesses=True)


@contextmanager
def planted(code: str, **options: object) -> Iterator[tuple[int, str]]:
    """Run Python code until the body ends; give its pid and its first line."""
    argv = [sys.executable, "-c", code]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, **options)
    try:
        yield child.pid, child.stdout.readline().strip()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def end(pid: int) -> None:
    """Kill an orphan and wait until it has gone."""
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        os.close(fd)


def kinds(check: LeakCheck) -> list[str]:
    return [leftover.kind for leftover in check.find()]


async def test_nothing_started_is_clean_at_once(leaks: LeakCheck) -> None:
    assert await leaks.wait_clean(0) < 1


async def test_a_child_titled_as_an_engine_is_left(leaks: LeakCheck, nonce: str) -> None:
    with planted(TITLED.format(title="VLLM::EngineCore")) as (pid, _):
        (found,) = leaks.find()
        assert found.pid == pid
        assert "VLLM::EngineCore" in found.what
        assert processes.title_of(pid) == "VLLM::EngineCore"
        assert processes.count_titles(nonce) == {"VLLM::EngineCore": 1}
    await leaks.wait_clean(2)


async def test_titles_with_details_count_by_their_first_word(nonce: str) -> None:
    code = TITLED.format(title="rbee-hive: http://127.0.0.1:9200")
    with planted(code), planted(code):
        assert processes.count_titles(nonce) == {"rbee-hive": 2}


async def test_a_child_in_a_session_of_its_own_is_left(leaks: LeakCheck) -> None:
    with planted(f"print(flush=True); {NAP}", start_new_session=True) as (pid, _):
        assert [found.pid for found in leaks.find()] == [pid]
    await leaks.wait_clean(2)


async def test_a_double_forked_child_is_left(leaks: LeakCheck) -> None:
    with planted(FORKED) as (_, orphan):
        pass
    assert [found.pid for found in leaks.find()] == [int(orphan)]
    end(int(orphan))
    await leaks.wait_clean(2)


async def test_a_noted_process_with_a_cleared_environment_is_left(home: Home) -> None:
    check = LeakCheck(home=home, nonce="none", tree=Tree(), venv=None)
    with planted(f"print(flush=True); {NAP}", env={}) as (pid, _):
        assert check.find() == []
        check.tree.refresh(pid)
        assert [found.why for found in check.find()] == ["noted as a descendant"]
    assert [identity.pid for identity in check.tree.noted] == [pid]
    await check.wait_clean(2)


def test_a_descendant_that_was_noted_is_left_after_its_parents_end(home: Home) -> None:
    script = f"{sys.executable} -c {NAP!r} & echo $!; wait"
    check = LeakCheck(home=home, tree=Tree(), venv=None)
    with subprocess.Popen(["sh", "-c", script], env={}, stdout=subprocess.PIPE) as parent:
        orphan = int(parent.stdout.readline())
        check.tree.refresh(parent.pid)
        parent.kill()
    assert [found.pid for found in check.find()] == [orphan]
    check.tree.kill()
    check.wait_clean_sync(2)


async def test_an_orphan_with_a_cleared_environment_is_left_through_its_mapped_files(
    leaks: LeakCheck,
) -> None:
    with planted(FORKED, env={}) as (_, orphan):
        pass
    (found,) = leaks.find()
    assert found.pid == int(orphan)
    assert "mapped" in found.why
    end(int(orphan))
    await leaks.wait_clean(2)


async def test_a_process_that_was_there_before_is_not_the_tests() -> None:
    with planted(FORKED, env={}) as (_, orphan):
        assert LeakCheck().find() == []
    end(int(orphan))


def test_the_venvs_process_of_another_living_owner_is_not_the_tests(home: Home) -> None:
    check = LeakCheck(home=home)
    code = f"import os, setproctitle; print(os.getppid(), os.getpid(), flush=True); {NAP}"
    owner = f"{sys.executable} -c '{code}' & wait"
    orphan = ["sh", "-c", 'setsid sh -c "$0" &', owner]
    with subprocess.Popen(orphan, env={}, stdout=subprocess.PIPE, text=True) as parent:
        owner_pid, pid = map(int, parent.stdout.readline().split())
    assert check.find() == []
    end(owner_pid)
    check.wait_clean_sync(2, spare=[pid])
    (found,) = check.kill()
    assert found.pid == pid


async def test_the_venvs_process_with_a_nonce_of_its_own_is_not_the_tests(home: Home) -> None:
    check = LeakCheck(home=home)
    code = TITLED.format(title="VLLM::EngineCore")
    with planted(code, env={"RBEE_NONCE": "another", "SPT_NOENV": "1"}):
        assert check.find() == []


async def test_a_spared_process_is_not_left_but_what_it_starts_is(leaks: LeakCheck) -> None:
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {NAP!r}]);"
    with planted(f"{code} print(p.pid, flush=True); p.wait()") as (pid, child):
        assert [found.pid for found in leaks.find(spare=[pid])] == [int(child)]
        end(int(child))
    await leaks.wait_clean(2)


async def test_a_zombie_is_left_while_its_parent_lives(leaks: LeakCheck) -> None:
    with planted(UNREAPED) as (pid, zombie):
        leaks.tree.refresh(pid)
        assert [(found.kind, found.pid) for found in leaks.find()] == [
            ("process", pid),
            ("zombie", int(zombie)),
        ]
        assert kinds(leaks).count("zombie") == 1
    await leaks.wait_clean(2)


def test_a_zombie_of_our_own_is_gone(leaks: LeakCheck) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    leaks.tree.refresh(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert leaks.find() == []
    child.wait()


async def test_a_listening_socket_is_left_with_its_process(leaks: LeakCheck) -> None:
    with planted(LISTENING) as (_, port):
        assert kinds(leaks) == ["process", "socket"]
        assert port in str(leaks.find()[1])
    await leaks.wait_clean(2)


async def test_a_listener_on_a_port_of_the_test_is_left_whoever_has_it(home: Home) -> None:
    with planted(LISTENING) as (_, port):
        check = LeakCheck(home=home, ports=[int(port)])
        assert kinds(check) == ["socket"]
    await check.wait_clean(2)


async def test_our_own_listener_on_such_a_port_is_not_left(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert LeakCheck(home=home, ports=[port]).find() == []


async def test_files_in_the_run_directory_are_left_but_locks_are_not(leaks: LeakCheck) -> None:
    run = leaks.home.run
    (run / "queen.lock").touch()
    assert leaks.find() == []
    (run / "w1").mkdir()
    (run / "w1/socket").touch()
    assert kinds(leaks) == ["file", "file"]
    shutil.rmtree(run / "w1")
    assert leaks.find() == []


@pytest.mark.parametrize("prefix", ["psm_", "sem.mp-"])
async def test_new_shared_memory_is_left(leaks: LeakCheck, prefix: str) -> None:
    path = processes.SHM / f"{prefix}{secrets.token_hex(4)}"
    path.touch()
    try:
        assert kinds(leaks) == ["shm"]
        with path.open():  # somebody who lives uses it: it is his
            assert leaks.find() == []
    finally:
        path.unlink()
    assert leaks.find() == []


async def test_shared_memory_of_others_names_or_from_before_is_not_left(home: Home) -> None:
    old = processes.SHM / f"psm_{secrets.token_hex(4)}"
    other = processes.SHM / f"unknown-{secrets.token_hex(4)}"
    old.touch()
    try:
        check = LeakCheck(home=home)
        other.touch()
        assert check.find() == []
    finally:
        old.unlink()
        other.unlink(missing_ok=True)


def record_of(pid: int) -> dict[str, int]:
    identity = processes.identify(pid)
    assert identity is not None
    return {"pid": identity.pid, "start": identity.start}


def in_child(_: int, pid: int) -> dict[str, object]:
    return {"guard": {"pid": 1, "start": 1}, "child": record_of(pid)}


def in_descendants(guard: int, pid: int) -> dict[str, object]:
    return {"guard": record_of(guard), "child": None, "descendants": [record_of(pid)]}


@pytest.mark.parametrize("record", [in_child, in_descendants])
async def test_guard_records_are_noted(
    home: Home, record: Callable[[int, int], dict[str, object]]
) -> None:
    check = LeakCheck(home=home, tree=Tree(), venv=None)
    path = home.run / "w1" / "guard-7.json"
    path.parent.mkdir()
    with planted(f"print(flush=True); {NAP}", env={}) as (pid, _):
        path.write_text(json.dumps(record(os.getpid(), pid)))
        check.tree.refresh(records_below=home.run)
        shutil.rmtree(path.parent)
        assert [found.pid for found in check.find()] == [pid]
    await check.wait_clean(2)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"guard": {"pid": "x"}}'])
async def test_damaged_guard_records_are_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "guard-7.json").write_text(text)
    assert processes.read_guard_records(tmp_path) == set()


async def test_a_pid_that_came_round_is_another_process() -> None:
    here = processes.identify(os.getpid())
    assert here is not None
    assert processes.is_running(here)
    before = processes.Identity(here.pid, here.start - 1, here.boot_id)
    assert not processes.is_running(before)
    with Tree() as tree:
        tree.note(before)
        tree.kill()  # or this test run ends here
        assert tree.running() == []


async def test_waiting_fails_with_all_that_is_left(leaks: LeakCheck) -> None:
    with planted(f"print(flush=True); {NAP}") as (pid, _):
        with pytest.raises(LeakError, match=rf"1 left after 0\.1 s:\n  process .*{pid}") as info:
            await leaks.wait_clean(0.1)
        assert [found.pid for found in info.value.leftovers] == [pid]
        with pytest.raises(LeakError):
            leaks.wait_clean_sync(0)
    leaks.wait_clean_sync(2)


async def test_waiting_returns_the_seconds_until_clean(leaks: LeakCheck) -> None:
    path = leaks.home.run / "socket"
    path.touch()

    async def remove() -> None:
        await trio.sleep(0.2)
        path.unlink()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(remove)
        assert 0.1 < await leaks.wait_clean(5) < 2


async def test_a_tree_is_kept_fresh_while_things_start(nonce: str) -> None:
    with Tree(os.getpid()) as tree:
        async with trio.open_nursery() as nursery:
            await nursery.start(tree.keep_fresh)
            with planted(f"print(flush=True); {NAP}") as (pid, _), trio.fail_after(5):
                # /proc has no event for it
                while pid not in {identity.pid for identity in tree.noted}:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


async def test_what_is_left_can_be_killed(leaks: LeakCheck) -> None:
    with planted(FORKED, env={}) as (_, orphan):
        pass
    with planted(f"print(flush=True); {NAP}") as (pid, _):
        assert {found.pid for found in leaks.kill()} == {int(orphan), pid}
        assert [left.pid for left in leaks.find()] == [int(orphan)]  # it may be somebody's daemon
        leaks.kill(guesses=True)
        assert leaks.find() == []


SUITE = """
import subprocess, sys
def test_one():
    subprocess.Popen([sys.executable, "-c", {code!r}], stdout=subprocess.DEVNULL, **{options}){end}
"""


@pytest.mark.parametrize(
    ("code", "options", "end", "status"),
    [
        (NAP, {}, ".kill()", 0),
        (NAP, {}, "", 1),
        (FORKED, {"env": {}}, ".wait()", 1),
    ],
    ids=["ended", "child", "orphan"],
)
def test_a_test_run_fails_when_anything_that_it_started_is_left(
    leaks: LeakCheck, tmp_path: Path, code: str, options: dict[str, object], end: str, status: int
) -> None:
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(SUITE.format(code=code, options=options, end=end))
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    leaks.kill(guesses=True)
    assert (run.returncode, "left behind" in run.stdout) == (status, bool(status)), run.stdout


def test_a_test_fails_that_logs_an_error(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    suite = "import logging\ndef test_one():\n    logging.getLogger('a.b').error('no %s', 'good')\n"
    (tmp_path / "test_it.py").write_text(suite)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "a.b: no good" in run.stdout
