"""What the command line prints: the only module that does.

stdout is data, stderr is narration. While a command runs in trio it writes through `Output`, whose
writes wait for a slow reader without blocking the thread: a keeper whose pipe is full must still
hear SIGTERM.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

from rbee.errors import RbeeError

PROGRESS_EVERY = 10.0
DIM, RED, CLEAR_LINE, PLAIN = "\x1b[2m", "\x1b[31m", "\r\x1b[K", "\x1b[0m"


class StdoutClosedError(RbeeError):
    """Whoever read our stdout has had enough (``| head -1``): not a failure."""

    code = "stdout_closed"
    exit_code = 0


def ensure_standard_fds() -> None:
    """Put /dev/null where 0, 1 or 2 is closed, lest a socket takes that number and our output."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def colours(stream: TextIO | None) -> bool:
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


async def write(fd: int, data: bytes) -> None:
    """Write all of ``data``; cancellable while the reader is slow."""
    import trio

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while data:
        # A file is always ready here, and epoll would refuse it.
        if not poll.poll(0):
            await trio.lowlevel.wait_writable(fd)
        data = data[os.write(fd, data[: select.PIPE_BUF]) :]


class Output:
    """The two streams of a running command.

    Args:
        quiet_data: keep tokens off stdout (``--json`` prints one object at the end).
    """

    def __init__(self, *, quiet_data: bool = False) -> None:
        self._quiet_data = quiet_data
        self._line_open = False  # data has been written since the last newline
        self._transient = False  # a progress line stands on the terminal
        self._colours = colours(sys.stderr)

    async def data(self, text: str) -> None:
        """Write answer text at once; raise `StdoutClosedError` when nobody reads any more."""
        if self._quiet_data or not text:
            return
        await self._clear_transient()
        try:
            await write(1, text.encode("utf-8", "replace"))
        except BrokenPipeError as exc:
            raise StdoutClosedError("stdout is closed") from exc
        self._line_open = not text.endswith("\n")

    def close_line(self) -> None:
        """End the line that `data` has left open; also while being cancelled, so never waits."""
        if self._line_open:
            self._line_open = False
            poll = select.poll()
            poll.register(1, select.POLLOUT)
            if poll.poll(0):
                with suppress(OSError):
                    os.write(1, b"\n")

    async def narrate(self, actor: str, action: str, text: str) -> None:
        """Tell on stderr what is going on; on a terminal ``progress`` overwrites itself."""
        await self._clear_transient()
        line = f"{actor}: {text}" if action == "progress" else f"{actor}: {action} {text}"
        if self._colours:
            line = f"{DIM}{line}{PLAIN}"
        self._transient = action == "progress" and is_terminal(sys.stderr)
        await self._stderr(line + ("" if self._transient else "\n"))

    async def _clear_transient(self) -> None:
        if self._transient:
            self._transient = False
            await self._stderr(CLEAR_LINE)

    async def _stderr(self, text: str) -> None:
        if self._line_open and is_terminal(sys.stdout) and is_terminal(sys.stderr):
            text = "\n" + text
            self._line_open = False
        with suppress(OSError):  # narration is no reason to fail
            await write(2, text.encode("utf-8", "replace"))


# at the end, outside of trio ----------------------------------------------------------------------
def print_error(error: RbeeError) -> None:
    """Print ``error: …`` and ``  hint: …``."""
    red, plain = (RED, PLAIN) if colours(sys.stderr) else ("", "")
    lines = [f"{red}error:{plain} {error.message}"]
    if log := str(error.details.get("log", "")).rstrip():
        lines += [f"  log: {line}" for line in log.splitlines() if line not in error.message]
    if error.hint:
        lines.append(f"  hint: {error.hint}")
    note("\n".join(lines))


def note(text: str) -> None:
    """Print a line on stderr."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class ProgressNotes:
    """Lines on stderr of which those with a share follow upon each other.

    On a terminal such a line has a bar and overwrites the one before; elsewhere one comes every
    ten seconds.
    """

    def __init__(self) -> None:
        self._transient = False
        self._next = 0.0

    def __call__(self, text: str, share: float | None = None) -> None:
        if share is None:
            self.clear()
            note(text)
        elif is_terminal(sys.stderr):
            # a line that wraps could not be overwritten
            room = shutil.get_terminal_size().columns - 1
            self._write(CLEAR_LINE + f"{bar(share)} {text}"[:room])
            self._transient = True
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_EVERY
            note(text)

    def clear(self) -> None:
        """Take the bar away: something else follows, or nothing."""
        if self._transient:
            self._transient = False
            self._write(CLEAR_LINE)

    def _write(self, text: str) -> None:
        with suppress(OSError):
            print(text, end="", file=sys.stderr, flush=True)


def bar(share: float, width: int = 20) -> str:
    full = round(min(max(share, 0.0), 1.0) * width)
    return f"[{'#' * full}{'.' * (width - full)}]"


def print_data(text: str) -> None:
    """Print a line on stdout; raise `StdoutClosedError` when nobody reads it."""
    try:
        print(text, flush=True)
    except BrokenPipeError as exc:
        # What is left in the buffer would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise StdoutClosedError("stdout is closed") from exc


def print_json(value: Any) -> None:
    print_data(json.dumps(value, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Print aligned columns with their names on top."""
    cells = [[name.upper().replace("_", " ") for name in columns]]
    cells += [[str(row.get(name) if row.get(name) is not None else "-") or "-" for name in columns]
              for row in rows]  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print_data("  ".join(map(str.ljust, line, widths)).rstrip())


def print_rows(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print rows as a table, or all they hold as a JSON list."""
    if as_json:
        print_json([dict(row) for row in rows])
    elif rows:
        print_table(columns, rows)


def print_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one thing's properties, a line each, or as a JSON object."""
    if as_json:
        print_json(dict(facts))
        return
    width = max(map(len, facts)) + 1
    for name, value in facts.items():
        print_data(
            f"{name.replace('_', ' ') + ':':{width}} {'-' if value in ('', None) else value}"
        )


def human_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
