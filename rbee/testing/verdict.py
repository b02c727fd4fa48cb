"""What a keeper must have said at its end, and what no log may hold."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import attrs

from rbee.home import Home

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# At the start of a line, so not those that vLLM's own processes prefix with their names.
TRACEBACK = re.compile(
    r"^[ |+]*(?:Exception Group )?Traceback \(most recent[^\n]*\n(?:[ |+][^\n]*\n)*[^\n]*",
    re.MULTILINE,
)
ERROR = re.compile(r"^error: .*$", re.MULTILINE)
UNASKED = "ended unasked"


@attrs.frozen
class Fault:
    """What was done to a conversation: a signal to a process, maybe while it was stopping."""

    process: str
    signal: signal.Signals
    state: str

    @property
    def asked(self) -> bool:
        """Whether the keeper was asked to end and nobody else was killed."""
        if self.process == "keeper":
            return self.signal in STOPS
        return self.signal == signal.SIGSTOP

    @property
    def kills_the_queen(self) -> bool:
        """Whether the keeper ends because its queen did."""
        is_queen = self.process in ("queen guard", "queen")
        return is_queen and self.signal != signal.SIGSTOP and self.state != "stopping"

    @property
    def hits_python(self) -> bool:
        """Whether the signal may meet Python's own handler: the user's shell holds back none."""
        return (self.process, self.signal, self.state) == ("keeper", signal.SIGINT, "starting")

    def exit_codes(self) -> tuple[int, ...]:
        """Return what the keeper may exit with."""
        asked = 128 + signal.SIGTERM
        if self.kills_the_queen:
            return (1,)
        if self.process != "keeper":
            return (asked,)
        if self.signal in STOPS:
            code = asked if self.state == "stopping" else 128 + self.signal
            if self.state != "starting":
                return (code,)
            # Python itself starts first, without any handler of ours.
            return (code, -self.signal, 1) if self.hits_python else (code, -self.signal)
        killed = -signal.SIGKILL
        return (killed, asked) if self.state == "stopping" else (killed,)


def problems(fault: Fault, code: int | None, keeper_log: Path, home: Home) -> Iterator[str]:
    """Yield what is wrong with a keeper's end and with the logs of its home."""
    if code not in (codes := fault.exit_codes()):
        yield f"the keeper exited with {code}, not with {codes}"
    said = _read(keeper_log)
    errors = ERROR.findall(said)
    if fault.kills_the_queen and (len(errors) != 1 or "queen" not in errors[0]):
        yield f"the keeper did not say in one line that its queen died: {errors}"
    if fault.asked and fault.process == "keeper" and errors:
        yield f"an end that was asked for is no error: {errors}"
    for path in [keeper_log, *sorted(home.logs.rglob("*.log*"))]:
        text = _read(path)
        for found in TRACEBACK.findall(text):
            # An interpreter that is interrupted while it starts may fail anywhere, in many words.
            if not fault.hits_python:
                yield f"a traceback in {path.name}:\n{found[:2000]}"
        if fault.asked and UNASKED in text:
            yield f"{path.name} says {UNASKED!r} of what was asked to end"


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
