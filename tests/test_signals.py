"""No signal reaches a process whose identity does not match: pids come round all the time here."""

from __future__ import annotations

import ast
import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

import rbee
from rbee import guard, sweep
from tests.kernel import GUARD, INIT, Kernel, Proc

BOOT = guard.boot_id()
RANDOMS = st.randoms(use_true_random=False)
quick = settings(max_examples=100, deadline=None)


def innocents(kernel: Kernel) -> list[Proc]:
    return [proc for proc in kernel.hit if not proc.ours]


# the property -----------------------------------------------------------------------------------
@quick
@given(random=RANDOMS, pid=st.integers(INIT, 9), start=st.integers(0, 8))
def test_a_signal_reaches_the_process_that_was_meant_or_none(
    random: Random, pid: int, start: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kernel = Kernel(random)
        for _ in range(5):
            kernel.fork(kernel.init)
        kernel.install(patch)
        was_sent = guard.send_signal(pid, start, signal.SIGTERM)
        assert [(one.pid, one.start) for one in kernel.hit] == [(pid, start)] * was_sent


@quick
@given(random=RANDOMS, size=st.integers(1, 5))
def test_a_guard_kills_its_whole_tree_and_nobody_else(random: Random, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kernel = Kernel(random)
        command = kernel.fork(kernel.guard)
        for _ in range(size):
            kernel.fork(random.choice([kernel.init, command]))
        kernel.install(patch)
        one = guard.Guard(guard.Plan({}), -1)
        one.child = command.pid
        one._kill_all()
        assert innocents(kernel) == []
        assert kernel.living(ours=True) == []


@quick
@given(random=RANDOMS, adopted=st.integers(1, 3))
def test_a_guard_ends_orphans_that_it_adopted_and_nobody_else(random: Random, adopted: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kernel = Kernel(random)
        for _ in range(adopted):
            kernel.fork(kernel.guard)
            kernel.fork(kernel.init)
        kernel.install(patch)
        one = guard.Guard(guard.Plan({"adopt_grace": 0.5}), -1)
        for now in (1.0, 2.0, 3.0):
            one._adopt(now)
        assert innocents(kernel) == []


@quick
@given(
    random=RANDOMS,
    ours=st.integers(0, 4),
    ghosts=st.lists(st.tuples(st.integers(INIT, 9), st.integers(1, 9)), max_size=4),
    boot=st.sampled_from([BOOT, "another"]),
)
def test_a_sweep_ends_what_the_journal_names_and_nobody_else(
    random: Random, ours: int, ghosts: list[tuple[int, int]], boot: str
) -> None:
    """``ghosts`` are gone already; their pids may be somebody else's by now."""
    with pytest.MonkeyPatch.context() as patch:
        kernel = Kernel(random)
        named = [kernel.fork(kernel.init, ours=boot == BOOT) for _ in range(ours)]
        for _ in range(3):
            kernel.fork(kernel.init)
        there = {(one.pid, one.start) for one in kernel.table.values()}
        identities = [(one.pid, one.start) for one in named]
        gone = [ghost for ghost in ghosts if ghost not in there and ghost[1] <= kernel.clock]
        kernel.exit(kernel.guard)
        kernel.install(patch)
        sweep_journal(boot, identities + gone)
        assert innocents(kernel) == []
        if boot == BOOT:
            assert [one for one in kernel.living(ours=True) if one in named] == []


def sweep_journal(boot: str, identities: list[tuple[int, int]]) -> None:
    dead = {"pid": GUARD, "start": 0}
    members = [{"pid": pid, "start": start} for pid, start in identities]
    record = {"boot_id": boot, "guard": dead, "child": dead, "descendants": members, "shm": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        Path(directory, "guard-2.json").write_text(json.dumps(record))
        clock = MockClock(autojump_threshold=0)
        trio.run(sweep.sweep, Path(directory), clock=clock)


# the only way ------------------------------------------------------------------------------------
SIGNALLING = {"kill", "killpg", "pidfd_send_signal", "pthread_kill", "terminate"}
KILLERS = ("kill", "pkill", "killall", "fuser")


def test_only_the_guards_own_function_signals() -> None:
    """Whatever signals calls `guard.signal_pidfd`, or `guard.send_signal`, which does."""
    package = Path(rbee.__file__).parent
    found = {
        (str(path.relative_to(package)), where, call)
        for path in package.rglob("*.py")
        if "testing" not in path.parts  # it strikes on purpose
        for where, call in signalling_calls(ast.parse(path.read_text()))
    }
    assert found == {("guard.py", "signal_pidfd", "pidfd_send_signal")}


def signalling_calls(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the function around each call that signals, and what is called there."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for outer in ast.walk(module):
        if isinstance(outer, functions):
            for node in ast.walk(outer):
                if isinstance(node, ast.Attribute) and node.attr in SIGNALLING:
                    yield outer.name, node.attr
                if isinstance(node, ast.Constant) and node.value in KILLERS:
                    yield outer.name, str(node.value)
