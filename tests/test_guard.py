"""A guard keeps one command's whole tree and ends it, whatever happens to whom."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee import guard
from rbee.guard import Guard, Lines, Plan
from rbee.testing.processes import LeakCheck, read_stat, title_of
from tests.trees import (
    GUARD,
    NAP,
    PYTHON,
    STUBBORN,
    TREE,
    Guarded,
    alive,
    code,
    guarded,
    kill,
    nested,
    plan_line,
    wait_for,
)

slow = pytest.mark.slow


# pure -----------------------------------------------------------------------------------------
@given(
    st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]))), st.data()
)
def test_lines_come_out_whole_from_any_split(texts: list[str], data: st.DataObject) -> None:
    sent = "".join(f"{text}\n" for text in texts).encode() + b"rest"
    cuts = data.draw(st.lists(st.integers(0, len(sent)), max_size=8))
    lines = Lines()
    places = itertools.pairwise(sorted({0, len(sent), *cuts}))
    assert [line for a, b in places for line in lines.feed(sent[a:b])] == texts
    assert lines.rest == b"rest"


def test_an_overlong_line_is_told_and_forgotten() -> None:
    lines = Lines()
    assert lines.feed(b"beat 1\n" + b"x" * guard.MAX_LINE) == ["beat 1"]
    assert lines.feed(b"x") == ["overlong"]
    assert lines.rest == b""


def test_a_signal_never_reaches_a_pid_that_came_round() -> None:
    with subprocess.Popen(code(NAP)) as child:
        start = guard.start_time(child.pid)
        for wrong in (start - 1, start + 1, 0, -1):
            assert not guard.send_signal(child.pid, wrong, signal.SIGKILL)
        assert child.poll() is None
        assert guard.send_signal(child.pid, start, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert guard.start_time(child.pid) == 0  # a zombie
        assert not guard.send_signal(child.pid, start, signal.SIGKILL)
        assert not guard.send_signal(child.pid, 0, signal.SIGKILL)
    assert not guard.send_signal(child.pid, start, 0)


def test_a_tree_is_removed_but_nothing_that_a_link_points_to(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    (kept / "sub").mkdir(parents=True)
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file").touch()
    (tree / "link").symlink_to(kept)
    (tree / "dangling").symlink_to("nowhere")
    link = tmp_path / "link"
    link.symlink_to(kept)
    for path in (tree, link, tmp_path / "never there"):
        guard.remove_tree(str(path))
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "sub"]
    guard.remove_tree(str(kept / "sub"))
    assert list(kept.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "ours"),
    [
        ("/dev/shm/psm_1a2b", True), ("/dev/shm/sem.mp-x", True), ("/dev/shm/torch_1_2", True),
        ("/dev/shm/model.safetensors", False), ("/dev/shm/psm_dir/model.safetensors", False),
        ("/dev/shm/psm_1 (deleted)", False), ("/tmp/psm_1", False), ("/dev/shm/", False),
    ],
)  # fmt: skip
def test_only_an_engines_own_shared_memory_is_cleaned(path: str, ours: bool) -> None:
    assert guard.is_engines_shm(path) is ours


def test_what_a_full_disk_did_not_take_is_written_later(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    one = Guard(Plan({"argv": ["x"], "record": str(tmp_path)}), 0)
    path = tmp_path / f"guard-{os.getpid()}.json"
    Path(f"{path}~").symlink_to("/dev/full")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        one.child = number
        one._write_record()
    assert len(os.listdir("/proc/self/fd")) == before
    assert capfd.readouterr().err.count("No space left") == 1
    Path(f"{path}~").unlink()
    one._write_record()
    assert json.loads(path.read_text())["child"]["pid"] == 4


# the ends of a tree ---------------------------------------------------------------------------
def close(one: Guarded) -> None:
    one.popen.stdin.close()


ENDS: dict[str, tuple[Callable[[Guarded], object], str]] = {
    "stop": (lambda one: one.say("stop\n"), "asked to"),
    "end of file": (close, "lifeline closed"),
    "unknown line": (lambda one: one.say("hello\n"), "unknown line 'hello'"),
    "overlong line": (lambda one: one.say("x" * (guard.MAX_LINE + 1)), "unknown line 'overlong'"),
    "no beat": (lambda one: None, "lease over (0.4 s without a beat)"),
    "SIGTERM": (lambda one: one.popen.send_signal(signal.SIGTERM), "SIGTERM"),
    "SIGINT": (lambda one: one.popen.send_signal(signal.SIGINT), "SIGINT"),
    "SIGHUP": (lambda one: one.popen.send_signal(signal.SIGHUP), "SIGHUP"),
}


@slow
@pytest.mark.parametrize("end", ENDS)
def test_every_end_terminates_the_command_and_kills_all_below(end: str, leaks: LeakCheck) -> None:
    cause, told = ENDS[end]
    lease = 0.4 if end == "no beat" else 0
    with guarded(code(TREE, NAP), leaks, lease=lease) as one:
        pids = one.hear()
        if not lease:  # else it may be over already
            assert all(map(alive, pids))
        leaks.tree.refresh(one.pid, *pids)
        cause(one)
        assert one.wait() == 128 + signal.SIGTERM
        assert not any(map(alive, pids))
        assert f"stopping: {told}" in one.log()
    leaks.wait_clean_sync(1)


@slow
@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("import os; os.abort()", 134),
    ],
)
def test_the_commands_own_end_is_passed_on(command: str, status: int, leaks: LeakCheck) -> None:
    with guarded(code(command), leaks) as one:
        assert one.wait() == status
        assert "why: -" in one.log()


@slow
def test_what_a_command_leaves_at_its_own_end_is_killed(leaks: LeakCheck) -> None:
    with guarded(code(TREE), leaks) as one:
        pids = one.hear()
        assert one.wait() == 0
        assert len(pids) == 3
        assert not any(map(alive, pids))
        assert "3 more killed" in one.log()


@slow
def test_a_second_signal_does_not_end_the_cleanup(leaks: LeakCheck) -> None:
    with guarded(code(STUBBORN), leaks) as one:
        one.hear()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            one.popen.send_signal(number)
        assert one.wait() == 128 + signal.SIGKILL
    leaks.wait_clean_sync(1)


@slow
def test_a_command_may_use_its_grace_and_gets_stop_and_end_of_file(leaks: LeakCheck) -> None:
    command = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: None)
print(1, flush=True)
told = sys.stdin.read()
os._exit(7 if told == "first\\nstop\\n" else 8)  # Python gives up its handlers before it ends
"""
    with guarded(code(command), leaks, first="first", grace=3) as one:
        one.hear()
        one.say("stop\n")
        assert one.wait(2) == 7


FREEZE = """
import os, signal, time
{}
while True:
    os.kill(os.getpid(), signal.SIGSTOP)
"""
HEARS_TERM = FREEZE.format("")
IGNORES_TERM = FREEZE.format("signal.signal(signal.SIGTERM, signal.SIG_IGN)")


FREEZES_AT_TERM = """
import os, signal, sys, time
def end(*_):
    time.sleep(0.2)  # the guard has sent all that it sends at once
    os.kill(os.getpid(), signal.SIGSTOP)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print(os.getpid(), flush=True)
signal.pause()
"""


def wait_until_frozen(pid: int) -> None:
    wait_for(lambda: read_stat(pid).state == "T")


@slow
def test_a_frozen_command_is_woken_to_hear_of_its_end(leaks: LeakCheck) -> None:
    with guarded(code(HEARS_TERM), leaks, grace=5) as one:
        wait_until_frozen(one.child)
        start = time.monotonic()
        one.say("stop\n")
        assert one.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - start < 1


@slow
def test_a_command_that_freezes_while_it_ends_is_woken(leaks: LeakCheck) -> None:
    with guarded(code(FREEZES_AT_TERM), leaks, grace=10) as one:
        one.hear()
        start = time.monotonic()
        one.say("stop\n")
        assert one.wait() == 0
        assert time.monotonic() - start < 3


@slow
def test_a_frozen_command_is_killed_after_the_grace(leaks: LeakCheck) -> None:
    with guarded(code(IGNORES_TERM), leaks, grace=0.5) as one:
        wait_until_frozen(one.child)
        start = time.monotonic()
        one.say("stop\n")
        assert one.wait() == 137
        assert 0.5 <= time.monotonic() - start < 1.5


@slow
def test_a_process_whose_main_thread_has_ended_is_killed_as_well(leaks: LeakCheck) -> None:
    """It shows as a zombie, but it runs."""
    headless = """
import ctypes, os, signal, threading, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=time.sleep, args=[60]).start()
print(os.getpid(), flush=True)
ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)
"""
    with guarded(code(headless), leaks, grace=0.2) as one:
        (pid,) = one.hear()
        wait_for(lambda: read_stat(pid).state == "Z")
        assert guard.start_time(pid) > 0
        assert guard.children(one.pid) == [pid]
        assert pid in guard.descendants({one.pid: guard.start_time(one.pid)})
        one.say("stop\n")
        assert one.wait() == 137


@slow
def test_a_full_pipe_to_a_frozen_command_does_not_block_the_guard(leaks: LeakCheck) -> None:
    with guarded(code(IGNORES_TERM), leaks) as one:
        wait_until_frozen(one.child)
        one.say("beat 1\n" * 30_000)  # three times what a pipe holds
        one.say("stop\n")
        assert one.wait() == 137


@slow
def test_a_chain_of_forks_does_not_outrun_the_guard(leaks: LeakCheck) -> None:
    bomb = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(1, flush=True)
os.close(1)
for _ in range(4):
    os.fork()
until = time.monotonic() + 10  # should the guard fail, it must not go on for ever
while time.monotonic() < until:
    if os.fork():
        os._exit(0)
    os.setsid()
    time.sleep(0.002)
"""
    with guarded(code(bomb), leaks, grace=0.2) as one:
        one.hear()
        one.say("stop\n")
        one.wait()
    leaks.wait_clean_sync(1)


@slow
def test_a_guard_that_fails_inside_still_ends_the_tree(leaks: LeakCheck) -> None:
    broken = "guard.Guard._adopt = lambda *args: os.listdir('/nothing')"
    program = code(f"import os, sys; sys.path.insert(0, {str(Path(guard.__file__).parent)!r})",
                   "import guard", broken, "os._exit(guard.main())")  # fmt: skip
    with guarded(code(TREE, NAP), leaks, program=program) as one:
        leaks.tree.refresh(one.pid)
        assert one.wait() == 137
        assert "cannot go on watching" in one.log()
        assert "error" not in one.popen.stdout.read()  # no "cannot start"
    leaks.wait_clean_sync(1)


# who guards the guards ------------------------------------------------------------------------
@slow
def test_the_inner_guard_cleans_when_the_outer_one_is_killed(leaks: LeakCheck) -> None:
    with guarded(**nested(code(TREE, NAP), leaks), leaks=leaks) as one:
        pids = one.hear()
        leaks.tree.refresh(one.pid)
        one.popen.kill()
        one.wait()
        leaks.wait_clean_sync(2)
        assert not any(map(alive, pids))
        assert "guard-b" in one.log()


@slow
def test_the_outer_guard_cleans_when_the_inner_one_is_killed(leaks: LeakCheck) -> None:
    with guarded(**nested(code(TREE, NAP), leaks), leaks=leaks) as one:
        pids = one.hear()
        leaks.tree.refresh(one.pid)
        kill(one.child)
        assert one.wait() == 137
        assert not any(map(alive, pids))
    leaks.wait_clean_sync(1)


@slow
def test_the_command_gets_end_of_file_when_both_guards_are_killed(leaks: LeakCheck) -> None:
    command = code("import os, sys; print(os.getpid(), flush=True); sys.stdin.read()")
    with guarded(**nested(command, leaks), leaks=leaks) as one:
        one.hear()
        leaks.tree.refresh(one.pid)
        both = [one.pid, one.child]
        for pid in both:
            os.kill(pid, signal.SIGSTOP)  # so that neither sees the other's end
        for pid in both:
            kill(pid)
        leaks.wait_clean_sync(2)


@slow
def test_beats_reach_the_inner_guard_and_their_end_ends_it(leaks: LeakCheck) -> None:
    arguments = nested(code("print(1, flush=True)", NAP), leaks, lease=0.5)
    with guarded(**arguments, leaks=leaks) as one:
        one.hear()
        for number in range(10):
            one.say(f"beat {number}\n")
            time.sleep(0.1)  # a second: two leases
        assert one.popen.poll() is None
        start = time.monotonic()
        assert one.wait(3) == 143
        assert time.monotonic() - start >= 0.3
        assert "stopping: lease over (0.5 s without a beat)" in one.log()


@slow
def test_an_outer_guard_that_is_frozen_is_woken_to_see_that_all_has_ended(
    leaks: LeakCheck,
) -> None:
    """Its owner may be another machine that has gone."""
    arguments = nested(code("print(1, flush=True)", NAP), leaks, lease=0.5, inner=True)
    with guarded(**arguments, leaks=leaks) as one:
        one.hear()
        os.kill(one.pid, signal.SIGSTOP)
        close(one)
        one.wait(5)


@slow
def test_a_guard_that_was_frozen_reads_the_beats_before_it_looks_at_the_lease(
    leaks: LeakCheck,
) -> None:
    with guarded(code("print(1, flush=True)", NAP), leaks, lease=0.3) as one:
        one.hear()
        os.kill(one.pid, signal.SIGSTOP)
        time.sleep(0.5)
        one.say("beat 1\n")
        os.kill(one.pid, signal.SIGCONT)
        one.say("beat 2\n")
        time.sleep(0.1)
        assert one.popen.poll() is None
        one.say("stop\n")
        assert one.wait() == 143
        assert "asked to" in one.log()


@slow
def test_an_orphan_adopted_from_a_dead_guard_is_ended_while_the_command_lives(
    leaks: LeakCheck,
) -> None:
    with guarded(code(TREE, NAP), leaks, adopt_grace=0.1) as one:
        ours, orphan, cleared = one.hear()
        wait_for(lambda: not alive(orphan))
        assert alive(ours)
        assert alive(cleared)
        assert one.popen.poll() is None
        one.say("stop\n")
        one.wait()


@slow
def test_a_guard_ends_its_tree_when_its_parent_is_killed(leaks: LeakCheck) -> None:
    log_file = leaks.home.log_file("guard")
    parent_code = (
        f"import os, subprocess; subprocess.Popen({GUARD}, stdin=int(os.environ['FD'])).wait()"
    )
    reader, writer = os.pipe()
    env = {**os.environ, "FD": str(reader)}
    parent = subprocess.Popen(
        code(parent_code), pass_fds=[reader], env=env, stdout=subprocess.PIPE, text=True
    )
    os.close(reader)
    os.write(writer, plan_line(code(TREE, NAP), log_file, parent=parent.pid, grace=0.3).encode())
    pids = parent.stdout.readline().split()
    leaks.tree.refresh(parent.pid)
    parent.kill()
    parent.wait()
    leaks.wait_clean_sync(2)
    assert len(pids) == 3
    assert "stopping: SIGTERM" in log_file.read_text()
    os.close(writer)
    parent.stdout.close()


@slow
def test_a_guard_whose_parent_is_gone_already_starts_nothing(leaks: LeakCheck) -> None:
    with guarded(code("print(1)"), leaks, parent=1 if os.getppid() != 1 else 2) as one:
        assert one.wait() == 1
        assert one.popen.stdout.read() == ""


# what it leaves and shows ---------------------------------------------------------------------
@slow
def test_ps_shows_a_guard_by_its_title(leaks: LeakCheck) -> None:
    with guarded(code("print(1, flush=True)", NAP), leaks) as one:
        one.hear()
        assert Path(f"/proc/{one.pid}/comm").read_text() == "rbee-guard\n"
        assert title_of(one.pid) == "rbee-guard"
        one.say("stop\n")
        one.wait()


@slow
def test_the_command_inherits_its_environment_and_three_descriptors(leaks: LeakCheck) -> None:
    listing = "import os; print(len(os.listdir('/proc/self/fd')) - 1, os.getpgrp() == os.getpid())"
    command = [*code(listing + "; print(os.environ['A'], os.environ['RBEE_NONCE'])")]
    with guarded(command, leaks, env={"A": "b c"}) as one:
        assert one.popen.stdout.readline() == "3 True\n"
        assert one.popen.stdout.readline() == f"b c {leaks.nonce}\n"
        assert one.wait() == 0


@slow
def test_the_record_tells_the_whole_tree_and_goes_with_it(leaks: LeakCheck) -> None:
    run_dir = leaks.home.run / "one"
    run_dir.mkdir()
    with guarded(code(TREE, NAP), leaks, record=str(run_dir)) as one:
        pids = one.hear()
        path = run_dir / f"guard-{one.pid}.json"

        def complete() -> dict | None:
            record = json.loads(path.read_text())
            noted = {item["pid"]: item["start"] for item in record["descendants"]}
            return record if noted.keys() >= set(pids) else None

        record = wait_for(complete)
        assert record["boot_id"] == guard.boot_id()
        assert record["nonce"] == leaks.nonce
        assert record["guard"] == {"pid": one.pid, "start": guard.start_time(one.pid)}
        assert record["child"] == {"pid": one.child, "start": guard.start_time(one.child)}
        for item in record["descendants"]:
            assert item["start"] == guard.start_time(item["pid"])
        one.say("stop\n")
        one.wait()
        assert list(run_dir.iterdir()) == []


@slow
def test_the_run_directory_is_removed(leaks: LeakCheck) -> None:
    run_dir = leaks.home.run / "one"
    (run_dir / "deep" / "er").mkdir(parents=True)
    (run_dir / "deep" / "socket").touch()
    with guarded(code("pass"), leaks, record=str(run_dir), remove=[str(run_dir)]) as one:
        one.wait()
    assert not run_dir.exists()


WRITE_RUN_FILE = """
import json, os, sys
with open({path!r}, "w") as file:
    file.write({text} or json.dumps({{"pid": os.getpid()}}))
"""


@slow
@pytest.mark.parametrize(
    ("text", "locked", "left"),
    [
        ("", False, False),
        ("", True, True),
        ('{"pid": 1}', False, True),
        ("[]", False, True),
        ("{", False, True),
    ],
    ids=["its own", "locked", "another's", "foreign", "damaged"],
)
def test_the_run_file_is_removed_if_it_is_the_commands_and_nobody_holds_the_lock(
    text: str, locked: bool, left: bool, leaks: LeakCheck
) -> None:
    path = leaks.home.run / "hive.json"
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
    if locked:
        fcntl.flock(lock, fcntl.LOCK_EX)
    command = code(WRITE_RUN_FILE.format(path=str(path), text=repr(text)))
    with guarded(command, leaks, run_file=str(path)) as one:
        assert one.wait() == 0
    os.close(lock)
    assert path.exists() is left


@pytest.fixture
def shm() -> Iterator[Callable[[str], Path]]:
    made: list[Path] = []

    def name(prefix: str) -> Path:
        made.append(Path(f"/dev/shm/{prefix}{secrets.token_hex(6)}"))
        return made[-1]

    yield name
    for path in made:
        path.unlink(missing_ok=True)


MAP = """
import mmap, sys, time
def take(path):
    with open(path, "w+b") as file:
        file.truncate(4096)
        return mmap.mmap(file.fileno(), 4096)
maps = [take(path) for path in {paths}]
print(1, flush=True)
time.sleep(60)
"""


@slow
@pytest.mark.parametrize("stubborn", [False, True])
def test_shared_memory_of_the_killed_is_unlinked_and_no_other(
    leaks: LeakCheck, shm: Callable[[str], Path], stubborn: bool
) -> None:
    engines, model, others = shm("psm_"), shm("model-"), shm("psm_")
    others.write_bytes(b"x")
    in_use = others.open()  # nobody's would be a leak to tests that run beside this one
    ignore = "import signal; signal.signal(15, signal.SIG_IGN)" if stubborn else ""
    with guarded(code(ignore, MAP.format(paths=[str(engines), str(model)])), leaks) as one:
        one.hear()
        assert engines.exists()
        one.say("stop\n")
        assert one.wait() == (137 if stubborn else 143)
    assert not engines.exists()
    assert model.exists()
    assert others.exists()
    in_use.close()


@slow
def test_the_log_is_capped_and_written_on(leaks: LeakCheck) -> None:
    program = code(f"import os, sys; sys.path.insert(0, {str(Path(guard.__file__).parent)!r})",
                   "import guard; guard.LOG_CAP = 1000", "os._exit(guard.main())")  # fmt: skip
    command = code("import os, time; os.write(2, b'old\\n' * 1000); print(1, flush=True)", NAP)
    with guarded(command, leaks, program=program) as one:
        one.hear()
        old = one.log_file.with_name(one.log_file.name + ".1")
        wait_for(lambda: old.exists() and one.log_file.stat().st_size == 0)
        assert old.read_text() == "old\n" * 250
        one.say("stop\n")
        one.wait()
        assert one.log().startswith("guard[")


@slow
def test_a_log_that_grows_without_end_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "endless").symlink_to("/dev/zero")
    program = code(
        f"import os, sys; sys.path.insert(0, {str(Path(guard.__file__).parent)!r})",
        "import guard; os.truncate(2, 3 * guard.LOG_CAP)",
        f"guard.cap_log({str(tmp_path / 'endless')!r})",
    )
    with (tmp_path / "log").open("ab") as log:
        subprocess.run(program, stderr=log, check=True, timeout=10)
    assert (tmp_path / "endless.1").stat().st_size == guard.LOG_CAP
    assert (tmp_path / "log").stat().st_size == 0


# what cannot be started -----------------------------------------------------------------------
@slow
def test_a_missing_command_is_an_error_line_and_127(leaks: LeakCheck) -> None:
    run_dir = leaks.home.run / "one"
    run_dir.mkdir()
    with guarded(["/no/such/program"], leaks, record=str(run_dir), remove=[str(run_dir)]) as one:
        kind, _, text = one.popen.stdout.readline().partition(" ")
        assert (kind, one.wait()) == ("error", 127)
        said = json.loads(text)
        assert said["message"] == "cannot start /no/such/program: No such file or directory"
    assert not run_dir.exists()


@slow
@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"", "no start line"),
        (b"start {", "no start line"),
        (b"hello\n", "the first line is not a start line"),
        (b"start {\n", "Expecting property name"),
        (b"start {}\n", "no command"),
        (b'start {"argv": 5}\n', "not iterable"),
        (b'start {"argv": ["x"], "lease": null}\n', "float"),
    ],
)
def test_a_wrong_start_line_is_refused_in_one_line(sent: bytes, told: str) -> None:
    run = subprocess.run(GUARD, input=sent, capture_output=True, check=False)
    error = run.stderr.decode()
    assert run.returncode == 2
    assert error.startswith("rbee-guard: ")
    assert told in error
    assert error.count("\n") == 1


@slow
def test_a_guard_runs_on_a_bare_node() -> None:
    """It takes nothing but the standard library: no site packages, no package of its own."""
    probe = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='guard'); print(*sys.modules)"
    argv = [*PYTHON, "-c", probe, guard.__file__]
    run = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert not {"rbee", "trio", "attrs", "asyncio", "pathlib"} & set(run.stdout.split())


# what /proc does not show -----------------------------------------------------------------------
def test_what_is_shown_or_gone_is_not_hidden() -> None:
    for pid in (os.getpid(), 1, 2**22 + 1):
        assert not guard.is_hidden(pid)


@slow
def test_a_process_of_somebody_else_may_be_hidden(tmp_path: Path) -> None:
    """In a mount namespace with hidepid, as nobody."""
    look = f"""
import ctypes, importlib.util, os
libc = ctypes.CDLL(None, use_errno=True)
os.unshare(os.CLONE_NEWNS) if hasattr(os, "unshare") else libc.unshare(0x20000)
failed = libc.mount(None, b"/", None, 0x44000, None)  # private
failed = failed or libc.mount(b"proc", b"/proc", b"proc", 0, b"hidepid=2")
spec = importlib.util.spec_from_file_location("guard", {str(tmp_path / "guard.py")!r})
guard = importlib.util.module_from_spec(spec)
spec.loader.exec_module(guard)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
print(failed, guard.start_time(1), guard.is_hidden(1), guard.is_hidden(os.getpid()))
"""
    shutil.copy(guard.__file__, tmp_path)
    done = subprocess.run(code(look), capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.startswith("0 "):
        pytest.skip(f"no /proc with hidepid here: {done.stderr.strip()[-200:]}")
    assert done.stdout == "0 0 True False\n"


# waking ---------------------------------------------------------------------------------------
# A reaper with a frozen child gets a further one, whose parent, gone or not, held its stdin.
WAKING = """
import os, signal, subprocess, sys
from rbee import guard
guard.become_subreaper()
frozen = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
frozen.send_signal(signal.SIGSTOP)
os.waitid(os.P_PID, frozen.pid, os.WSTOPPED)
wake = [sys.executable, "-c", "from rbee import guard; guard.wake_siblings()"]
try:
    if sys.argv[1] == "alive":
        assert subprocess.Popen(wake, stdin=subprocess.PIPE).wait() == 0
    else:
        script = 'read line; exec "$@"'
        code = "import subprocess, sys; subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)"
        argv = [sys.executable, "-c", code, "/bin/sh", "-c", script, "sh", *wake]
        subprocess.run(argv, check=True)
        assert os.waitid(os.P_ALL, 0, os.WEXITED).si_status == 0
    print(guard._stat(frozen.pid)[0] == b"T")
finally:
    frozen.kill()
"""


@pytest.mark.parametrize(("parent", "stays"), [("alive", "False"), ("gone", "True")])
def test_only_children_of_a_parent_that_is_there_are_woken(parent: str, stays: str) -> None:
    line = [sys.executable, "-c", WAKING, parent]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == stays
