"""Programs that run to their end and leave a log: how they are started, what their failure says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rbee.errors import RbeeError, from_wire

TAIL = 12


class Runner(Protocol):
    """Run one program to its end; return its exit code.

    Stdout and stderr both go to ``log``; ``env`` is put on top of our environment. Cancelling ends
    the program and all that it started before the call returns.
    """

    async def __call__(
        self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None
    ) -> int: ...


class Narrate(Protocol):
    """Tell the user what happens; ``share`` is how much of it is done, 0 … 1, where that is known.

    Lines with a share come a few times a second and follow upon each other.
    """

    def __call__(self, action: str, text: str, *, share: float | None = None) -> None: ...


def log_tail(log: Path, lines: int = TAIL) -> str:
    """Return the last lines that say something; what our guards note is not the program's."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    said = [line for line in text.splitlines() if line.strip() and not line.startswith("guard[")]
    return "\n".join(said[-lines:])


def told_error(log: Path) -> RbeeError | None:
    """Return the error that one of our own programs printed as its last word, if it did."""
    for line in reversed(log_tail(log).splitlines()):
        if line.startswith('{"error":'):
            try:
                told = json.loads(line)["error"]
                return from_wire(
                    told["code"],
                    told["message"],
                    hint=told["hint"],
                    status=told["status"],
                    details=told["details"],
                )
            except (ValueError, KeyError, TypeError):
                return None
    return None


def error_line(error: RbeeError) -> str:
    """Write an error as the one line that `told_error` reads."""
    told = {
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "status": error.http_status,
        "details": error.details,
    }
    return json.dumps({"error": told}) + "\n"
