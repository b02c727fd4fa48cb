"""An owned child is a scope: it has said hello when the body runs, and is gone afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

from rbee import guard
from rbee.errors import ChildExitedError, ConflictError, MachineError, PeerError
from rbee.process import (
    Daemon,
    Lifeline,
    Process,
    _read_hello,
    log_tail,
    open_daemon,
    open_guarded,
    run_program,
)
from rbee.testing.processes import LeakCheck
from rbee.wire.messages import DaemonStart, Hello
from tests.trees import NAP, STUBBORN, TREE, alive, code, kill, wait_for

slow = pytest.mark.slow

HELLO = {"component": "hive", "id": "hive-1", "version": "1", "pid": 5, "url": "http://x"}
# Reads its start line and says hello; then it lives until its lifeline ends.
DAEMON = f"""
import json, os, sys
start = sys.stdin.readline()
print("hello", json.dumps({{**{HELLO!r}, "pid": os.getpid(),
      "capabilities": {{"start": start}}}}), flush=True)
os.dup2(2, 1)
"""
UNTIL_EOF = "sys.stdin.read(); os._exit(0)"


def owned(
    leaks: LeakCheck, *parts: str, graces: Sequence[float] = (0.8, 0.4), **options: Any
) -> AbstractAsyncContextManager[Daemon]:
    start = DaemonStart(
        owner="queen-1", token="secret", run_dir=str(leaks.home.run / "hive-1"), lease=5.0
    )
    return open_daemon(
        code(*parts), start, graces=graces, log_file=leaks.home.log_file("hive"), **options
    )


async def refused(leaks: LeakCheck, *parts: str) -> BaseException:
    """Return the one error of a daemon that does not say hello; nothing of it is left."""
    with pytest.raises(BaseExceptionGroup) as info:
        async with owned(leaks, *parts):
            pytest.fail("the body ran")
    await leaks.wait_clean(0.2)
    found: BaseException = info.value
    while isinstance(found, BaseExceptionGroup):
        (found,) = found.exceptions
    return found


# hello ----------------------------------------------------------------------------------------
@slow
async def test_a_daemon_that_said_hello_is_there_and_gone_after_the_body(leaks: LeakCheck) -> None:
    async with owned(leaks, DAEMON, UNTIL_EOF, env={"A": "b"}) as daemon:
        hello = daemon.hello
        assert alive(hello.pid)
        assert Hello(**HELLO) == Hello(hello.component, hello.id, hello.version, 5, hello.url)
        kind, _, text = hello.capabilities["start"].partition(" ")
        assert (kind, json.loads(text)["token"]) == ("start", "secret")
        environ = Path(f"/proc/{hello.pid}/environ").read_bytes()
        assert b"\0A=b\0" in environ
        for hidden in (environ, Path(f"/proc/{hello.pid}/cmdline").read_bytes()):
            assert b"secret" not in hidden
        leaks.tree.refresh(os.getpid())
    assert not alive(hello.pid)
    await leaks.wait_clean(0.2)


@slow
async def test_an_error_line_is_raised_as_its_class(leaks: LeakCheck) -> None:
    line = {"code": "conflict", "message": "port taken", "hint": "use another"}
    error = await refused(leaks, f"print('error', {json.dumps(line)!r})")
    assert isinstance(error, ConflictError)
    assert (error.message, error.hint) == ("port taken", "use another")


@slow
async def test_an_end_before_hello_is_told_with_the_logs_tail(leaks: LeakCheck) -> None:
    error = await refused(leaks, "import sys; sys.exit('no such luck')")
    assert isinstance(error, ChildExitedError)
    assert "ended unasked with code 1" in error.message
    assert "no such luck" in error.details["log"]
    assert error.hint.startswith("tail -n 50 ")


@slow
async def test_a_daemon_that_talks_nonsense_is_ended(leaks: LeakCheck) -> None:
    error = await refused(leaks, "print('good day', flush=True)", NAP)
    assert type(error) is PeerError


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("good day", "expected hello from the daemon, got 'good day'"),
        ("hello {}", "talks nonsense: not a valid Hello"),
        ("hello [", "talks nonsense"),
        ("error nonsense", "talks nonsense"),
        ("error []", "talks nonsense"),
        ("\udcff", "expected hello"),
    ],
)
async def test_nonsense_instead_of_hello_is_the_peers_fault(
    line: str, told: str, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.write(writer, line.encode(errors="surrogateescape") + b"\n")
    os.close(writer)
    process = Process(0, -1, Lifeline(-1), trio.sleep_forever)
    with os.fdopen(reader, "rb") as output, pytest.raises(PeerError, match=re.escape(told)):
        await _read_hello(process, output, tmp_path / "log")


@slow
async def test_nothing_is_started_where_a_process_cannot_be_held(
    leaks: LeakCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(os, "pidfd_open")
        patch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("started"))
        with pytest.raises(MachineError, match="runs on Linux"):
            async with owned(leaks, DAEMON, UNTIL_EOF):
                pytest.fail("the body ran")
    await leaks.wait_clean(0.2)


async def test_a_missing_program_is_a_machine_error(leaks: LeakCheck) -> None:
    start = DaemonStart(owner="q", token="t", run_dir=str(leaks.home.run / "hive-1"))
    with pytest.RaisesGroup(
        pytest.RaisesExc(MachineError, match="cannot start /no/such"), flatten_subgroups=True
    ):
        async with open_daemon(
            ["/no/such"], start, graces=[1.0, 0.5], log_file=leaks.home.log_file("hive")
        ):
            pytest.fail("the body ran")
    await leaks.wait_clean(0.2)


@slow
async def test_cancelling_while_waiting_for_hello_leaves_nothing(leaks: LeakCheck) -> None:
    with trio.move_on_after(0.3) as scope:
        async with owned(leaks, "import os; os.dup2(2, 1)", TREE, NAP):
            pytest.fail("the body ran")
    assert scope.cancelled_caught
    await leaks.wait_clean(0.2)


async def test_a_run_directory_that_is_there_already_is_refused(leaks: LeakCheck) -> None:
    (leaks.home.run / "hive-1" / "x").mkdir(parents=True)
    with pytest.raises(MachineError):
        async with owned(leaks, DAEMON):
            pytest.fail("the body ran")
    guard.remove_tree(str(leaks.home.run / "hive-1"))
    guard.remove_tree(str(leaks.home.run / ".hive-1"))


# the end --------------------------------------------------------------------------------------
async def leave(leaks: LeakCheck, *parts: str, graces: Sequence[float] = (0.8, 0.4)) -> float:
    """Return the seconds that leaving takes; nothing is left then."""
    async with owned(leaks, *parts, graces=graces) as daemon:
        leaks.tree.refresh(os.getpid())
        begin = trio.current_time()
        assert daemon.process.status is None
    took = trio.current_time() - begin
    await leaks.wait_clean(0.2)
    return took


@slow
async def test_a_daemon_that_ends_when_asked_is_gone_at_once(leaks: LeakCheck) -> None:
    assert await leave(leaks, DAEMON, UNTIL_EOF, graces=(5, 4)) < 2


@slow
async def test_a_daemon_that_ignores_everything_is_gone_after_its_grace(leaks: LeakCheck) -> None:
    ignore = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]"
    took = await leave(leaks, ignore, DAEMON, "time.sleep(60)")
    assert 0.4 <= took < 1.8


@slow
async def test_a_frozen_outer_guard_does_not_hold_up_the_end(leaks: LeakCheck) -> None:
    async with owned(leaks, DAEMON, TREE, UNTIL_EOF) as daemon:
        leaks.tree.refresh(os.getpid())
        os.kill(daemon.process.pid, signal.SIGSTOP)
        begin = trio.current_time()
    assert trio.current_time() - begin < 0.8 + 1
    await leaks.wait_clean(0.2)


@slow
@pytest.mark.parametrize("who", ["a", "b", "daemon"])
async def test_an_unasked_end_is_seen_and_leaves_nothing(who: str, leaks: LeakCheck) -> None:
    async with owned(leaks, DAEMON, TREE, UNTIL_EOF) as daemon:
        leaks.tree.refresh(os.getpid())
        guard_a = daemon.process.pid
        (guard_b,) = guard.children(guard_a)
        victim = {"a": guard_a, "b": guard_b, "daemon": daemon.hello.pid}[who]
        os.kill(victim, signal.SIGKILL)
        with trio.fail_after(2):
            status = await daemon.wait()
        assert status == 137
        assert "hive ended unasked with signal SIGKILL" in daemon.ended(status).message
    await leaks.wait_clean(0.2)


@slow
async def test_the_body_may_be_left_with_an_error(leaks: LeakCheck) -> None:
    with pytest.RaisesGroup(KeyError, flatten_subgroups=True):
        async with owned(leaks, DAEMON, UNTIL_EOF):
            raise KeyError
    await leaks.wait_clean(0.2)


class CancelAt(trio.abc.Instrument):
    """Cancel a scope at the n-th step of the task that made this."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self.scope = scope
        self.steps = steps
        self.task = trio.lowlevel.current_task()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.steps -= 1
            if self.steps == 0:
                self.scope.cancel()


async def live(leaks: LeakCheck) -> None:
    async with owned(leaks, DAEMON, UNTIL_EOF, graces=(0.6, 0.3)) as daemon:
        await trio.lowlevel.checkpoint()
        daemon.process.lifeline.write("beat 0")
        await trio.lowlevel.checkpoint()


@slow
async def test_a_childs_life_can_be_cancelled_at_each_await(leaks: LeakCheck) -> None:
    for steps in range(1, 30):
        with trio.CancelScope() as scope:
            instrument = CancelAt(scope, steps)
            trio.lowlevel.add_instrument(instrument)
            try:
                await live(leaks)
            finally:
                trio.lowlevel.remove_instrument(instrument)
        await leaks.wait_clean(0.2)
        if instrument.steps > 0:
            break
    assert 5 < steps < 29  # it went through all of its life


@slow
async def test_no_file_descriptor_stays_open(leaks: LeakCheck) -> None:
    await live(leaks)
    before = len(os.listdir("/proc/self/fd"))
    await live(leaks)
    await refused(leaks, "pass")
    assert len(os.listdir("/proc/self/fd")) == before


@slow
async def test_descriptors_are_closed_also_if_something_does_not_end(
    leaks: LeakCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stuck(directory: Path, *, patience: float) -> int:
        raise MachineError("stuck")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("rbee.process.sweep", stuck)
    with pytest.raises(MachineError, match="stuck"):
        await live(leaks)
    assert len(os.listdir("/proc/self/fd")) == before


@slow
async def test_a_child_that_ended_before_it_is_stopped_is_reaped(leaks: LeakCheck) -> None:
    async with open_guarded(code("pass"), graces=[0.5], log_file=leaks.home.log_file("x")) as (
        process,
        _,
    ):
        pid = process.pid
        await trio.to_thread.run_sync(wait_for, process.ended)
        assert process.status is None
    assert process.status == 0
    assert not Path(f"/proc/{pid}").exists()


# programs -------------------------------------------------------------------------------------
@slow
@pytest.mark.parametrize(("source", "status"), [("", 0), ("raise SystemExit(3)", 3)])
async def test_a_program_runs_to_its_end(source: str, status: int, leaks: LeakCheck) -> None:
    log_file = leaks.home.log_file("program")
    command = code("import os; os.write(1, b'out\\n'); os.write(2, b'err\\n')", source)
    assert await run_program(command, log_file=log_file) == status
    assert "out\nerr\n" in log_file.read_text()
    await leaks.wait_clean(0.2)


@slow
async def test_a_program_that_was_killed_is_told_by_its_signal(leaks: LeakCheck) -> None:
    command = code("import os; os.kill(os.getpid(), 9)")
    assert await run_program(command, log_file=leaks.home.log_file("program")) == 137


@slow
async def test_a_cancelled_program_leaves_nothing(leaks: LeakCheck) -> None:
    log_file = leaks.home.log_file("program")

    def begun() -> bool:
        return len(log_file.read_text().split()) == 3

    async with trio.open_nursery() as nursery:
        program = lambda: run_program(code(TREE, NAP), log_file=log_file, grace=0.3)  # noqa: E731
        nursery.start_soon(program)
        await trio.to_thread.run_sync(wait_for, lambda: log_file.exists() and begun())
        leaks.tree.refresh(os.getpid())
        nursery.cancel_scope.cancel()
    await leaks.wait_clean(0.2)


OWNER = f"""
import sys, trio
from functools import partial
from pathlib import Path
from rbee.process import run_program
trio.run(partial(run_program, {["/usr/bin/env", *code(STUBBORN)]!r}, log_file=Path(sys.argv[1]),
                 grace=0.2))
"""


@slow
@pytest.mark.parametrize("killed", [("owner",), ("guard",), ("owner", "guard")], ids=" and ".join)
def test_a_program_ends_with_whoever_is_killed_above_it(
    killed: tuple[str, ...], leaks: LeakCheck
) -> None:
    """It hears of nothing by itself: such is pip."""
    log_file = leaks.home.log_file("program")
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(log_file)])
    program = wait_for(lambda: log_file.exists() and int(log_file.read_text() or 0))
    (guarding,) = guard.children(owner.pid)
    leaks.tree.refresh(owner.pid)
    victims = {"owner": owner.pid, "guard": guarding}
    for victim in killed:
        os.kill(victims[victim], signal.SIGSTOP)  # all at the same moment: none sees the other go
    for victim in killed:
        kill(victims[victim])
    owner.wait()
    leaks.wait_clean_sync(3)
    assert not alive(program)


async def test_a_log_that_cannot_be_written_is_a_machine_error(leaks: LeakCheck) -> None:
    with pytest.raises(MachineError, match="cannot write"):
        await run_program(["x"], log_file=leaks.home.root / "none" / "log")


# small parts ----------------------------------------------------------------------------------
async def test_writing_to_a_full_or_broken_lifeline_never_blocks_or_fails() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    line = Lifeline(writer)
    for _ in range(70):
        line.write("x" * 1000)
    os.close(reader)
    line.write("beat 1")
    line.end()
    line.end()
    assert line.fd == -1


async def test_a_beat_is_written_at_once_and_then_every_two_seconds(
    autojump_clock: trio.abc.Clock,
) -> None:
    reader, writer = os.pipe()
    line = Lifeline(writer)
    with trio.move_on_after(5):
        await line.keep_beating()
    line.end()
    with os.fdopen(reader) as file:
        assert file.read() == "beat 1\nbeat 2\nbeat 3\nstop\n"


def test_a_logs_tail_is_its_last_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert log_tail(path) == ""
    path.write_text("short\n")
    assert log_tail(path) == "short\n"
    path.write_text("".join(f"line {n}\n" for n in range(1000)))
    tail = log_tail(path, 100)
    assert tail.startswith("line 9")
    assert tail.endswith("line 999\n")
    assert len(tail) <= 100
    path.write_text("x" * 500 + "\n")
    assert log_tail(path, 100) == "x" * 99 + "\n"
