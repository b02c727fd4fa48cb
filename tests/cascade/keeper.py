"""`rbee-keeper` as its user has it: a process, its two streams, its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs

COMMAND = (sys.executable, "-m", "rbee")
PATIENCE = 60.0  # seconds; a busy machine starts slowly


@attrs.frozen
class Done:
    """One command that has ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def hints(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("  hint: ")]

    def check_refusal(self, *needles: str, code: int = 1, out: str = "") -> None:
        """Hold it to one error that says it all, one hint, no traceback, no other output."""
        told = f"\n{self.err}\n{self.out}"
        assert self.code == code, told
        assert self.out == out, told
        assert "Traceback" not in self.err, told
        assert len(self.errors) == len(self.hints) == 1, told
        for needle in needles:
            assert needle in self.err, told


def run(*line: str, argv: Sequence[str] = COMMAND, **options: Any) -> Done:
    """Run one command to its end; options are those of `subprocess.run`."""
    if "input" not in options:
        options["stdin"] = subprocess.DEVNULL
    done = subprocess.run([*argv, *line], capture_output=True, timeout=PATIENCE, **options)
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode("utf-8", "replace"))


def infer(model: str, *line: str, prompt: str = "hello bee", **options: Any) -> Done:
    """Ask an echo model, unless ``line`` names another engine."""
    return run(*_line(model, line, prompt), **options)


def _line(model: str, line: Sequence[str], prompt: str) -> list[str]:
    default = {"--engine": "echo", "--prompt": prompt}
    added = [word for flag, value in default.items() if flag not in line for word in (flag, value)]
    return ["infer", "--model", model, *line, *added]


@attrs.define(eq=False)
class Running:
    """A command that still runs; `end` waits for it."""

    popen: subprocess.Popen[bytes]
    read: bytes = b""

    @property
    def pid(self) -> int:
        return self.popen.pid

    def read_some(self, least: int = 1) -> None:
        """Wait until so many more bytes of the answer have come."""
        assert self.popen.stdout is not None
        wanted = len(self.read) + least
        while len(self.read) < wanted:
            more = os.read(self.popen.stdout.fileno(), 65536)
            assert more, self.end()
            self.read += more

    def signal(self, *numbers: int) -> None:
        for number in numbers:
            self.popen.send_signal(number)

    def end(self) -> Done:
        out, err = self.popen.communicate(timeout=PATIENCE)
        return Done(self.popen.returncode, (self.read + out).decode(), err.decode())


@contextmanager
def running_infer(
    model: str, *line: str, env: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Running]:
    """Start an answer; whatever happens in the body, the command has ended afterwards."""
    argv = [*COMMAND, *_line(model, line, "hello bee")]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, env=env, **pipes | options) as popen:
        try:
            yield Running(popen)
        finally:
            popen.kill()
