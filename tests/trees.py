"""Process trees for the tests of guards: commands as code, and a guard started by hand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from rbee import guard
from rbee.testing.processes import LeakCheck

PYTHON = (sys.executable, "-I", "-S")
GUARD = (*PYTHON, guard.__file__)

# Ignores every stop signal; started with an argument it leaves its parent first.
STUBBORN = """
import os, signal, sys, time
for number in (1, 2, 15):
    signal.signal(number, signal.SIG_IGN)
if len(sys.argv) > 1:
    if os.fork():
        os._exit(0)
    os.setsid()
print(os.getpid(), flush=True)
os.close(1)
time.sleep(60)
"""
# Says the pids of three stubborn ones: in a session of its own, double-forked, without environment.
TREE = f"""
import os, subprocess, sys, time
def start(*args, **options):
    argv = [sys.executable, "-I", "-S", "-c", {STUBBORN!r}, *args]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, **options)
    return int(child.stdout.readline())
print(start(start_new_session=True), start("leave"), start(env={{}}), flush=True)
"""
NAP = "import time; time.sleep(60)"


def code(*parts: str) -> list[str]:
    return [*PYTHON, "-c", "\n".join(parts)]


def alive(pid: int) -> bool:
    return guard.start_time(pid) > 0


def wait_for(happened: Callable[[], Any], within: float = 20.0) -> Any:
    """Wait for what has no event, such as a change in /proc."""
    until = time.monotonic() + within
    while not (found := happened()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
    return found


def kill(pid: int) -> None:
    assert guard.send_signal(pid, guard.start_time(pid), signal.SIGKILL)


@attrs.define
class Guarded:
    """A guard and what its command says."""

    popen: subprocess.Popen[str]
    log_file: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def child(self) -> int:
        return wait_for(lambda: guard.children(self.pid))[0]

    def log(self) -> str:
        return self.log_file.read_text()

    def say(self, text: str) -> None:
        self.popen.stdin.write(text)
        self.popen.stdin.flush()

    def hear(self) -> list[int]:
        """Read one line of pids."""
        return [int(word) for word in self.popen.stdout.readline().split()]

    def wait(self, within: float = 20.0) -> int:
        return self.popen.wait(within)


def plan_line(argv: Sequence[str], log_file: Path, **plan: Any) -> str:
    return f"start {json.dumps({'argv': list(argv), 'log': str(log_file), **plan})}\n"


@contextmanager
def guarded(
    argv: Sequence[str],
    leaks: LeakCheck,
    *,
    program: Sequence[str] = GUARD,
    log_file: Path | None = None,
    **plan: Any,
) -> Iterator[Guarded]:
    """Start a guard by hand; whatever the body has not ended is killed by ``leaks``."""
    log_file = log_file or leaks.home.log_file("guard")
    pipe = subprocess.PIPE
    plan = {"grace": 0.3, **plan}
    with log_file.open("a") as log:
        popen = subprocess.Popen(
            program, stdin=pipe, stdout=pipe, stderr=log, text=True, start_new_session=True
        )
    try:
        one = Guarded(popen, log_file)
        one.say(plan_line(argv, log_file, **plan))
        yield one
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()
        with suppress(BrokenPipeError):  # of a line that was not read any more
            popen.stdin.close()


def nested(argv: Sequence[str], leaks: LeakCheck, **inner: Any) -> dict[str, Any]:
    """Make the arguments of `guarded` for two guards, one around the other."""
    log_file = leaks.home.log_file("guard")
    line = plan_line(argv, log_file, **{"name": "guard-b", "grace": 0.3, **inner}).strip()
    return {"argv": GUARD, "first": line, "name": "guard-a", "grace": 0.8}


def holders(what: str, token: str) -> set[str]:
    """Return the commands of the processes that have ``token`` in a file of theirs in /proc."""
    found = set()
    for path in Path("/proc").glob(f"[0-9]*/{what}"):
        try:
            if token.encode() in path.read_bytes():
                found.add(path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
