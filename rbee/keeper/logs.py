"""``logs``: the files below ``$RBEE_HOME/logs``, their ends and what comes after."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import trio

from rbee.errors import BadInputError, NotFoundError
from rbee.home import Home, find_home
from rbee.keeper.flags import LogFlags
from rbee.keeper.output import Output, note
from rbee.model import LOCALHOST, node_name

POLL = 0.2
BLOCK = 1 << 16


async def show_logs(flags: LogFlags) -> None:
    """Print the ends of the logs; with ``follow``, whatever comes until stopped."""
    if flags.lines < 0:
        raise BadInputError(
            f"--lines must be at least 0, got {flags.lines}", hint="rbee-keeper logs --lines 50"
        )
    if flags.node is not None and node_name(flags.node) != LOCALHOST:
        from rbee.keeper.far_logs import show_far_logs

        await show_far_logs(flags, flags.node)
        return
    paths = log_files(find_home(flags.home), worker=flags.worker)
    if not paths:
        note("no logs yet")
    name_width = max((len(path.stem) for path in paths), default=0) if len(paths) > 1 else 0
    output = Output()
    tails = [Tail(path) for path in paths]
    for tail in tails:
        await _print(output, tail.path, tail.last(flags.lines), name_width, as_json=flags.json)
    while flags.follow:
        for tail in tails:
            await _print(output, tail.path, tail.more(), name_width, as_json=flags.json)
        await trio.sleep(POLL)
        known = {tail.path for tail in tails}
        found = log_files(find_home(flags.home), worker=flags.worker)
        tails += [Tail(path) for path in found if path not in known]


def log_files(home: Home, *, worker: str | None = None) -> list[Path]:
    """Return the log files asked for, by name.

    Raises:
        NotFoundError: no such worker; the message says which there are.
    """
    paths = sorted(home.logs.glob("*.log"))
    if worker is None:
        return paths
    found = [path for path in paths if worker in (path.stem, path.stem.partition("-")[2])]
    if not found:
        known = ", ".join(path.stem for path in paths if path.stem.startswith("worker"))
        raise NotFoundError(
            f"no log of a worker {worker!r}; there are: {known or 'none'}",
            code="unknown_worker",
            hint="rbee-keeper worker list",
        )
    return found


class Tail:
    """The end of one file that grows, is rotated or cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = 0
        self._at = 0
        self._rest = b""

    def last(self, count: int) -> list[str]:
        """Return the last ``count`` lines and go on after them."""
        try:
            with self.path.open("rb") as file:
                self._note(file)
                lines = _last_lines(file, count)
                self._at = file.seek(0, os.SEEK_END)
        except OSError:
            return []
        return _decoded(lines)

    def more(self) -> list[str]:
        """Return the whole lines that have come since."""
        try:
            with self.path.open("rb") as file:
                self._note(file)
                file.seek(self._at)
                data = file.read(BLOCK)
        except OSError:
            return []
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return _decoded(lines)

    def _note(self, file: BinaryIO) -> None:
        """Begin again when another file has taken the name, or it was cut."""
        found = os.fstat(file.fileno())
        if found.st_ino != self._inode or found.st_size < self._at:
            self._inode, self._at, self._rest = found.st_ino, 0, b""


def _last_lines(file: BinaryIO, count: int) -> list[bytes]:
    end = file.seek(0, os.SEEK_END)
    data, begin = b"", end
    while begin > 0 and data.count(b"\n") <= count:
        step = min(BLOCK, begin)
        begin -= step
        file.seek(begin)
        data = file.read(step) + data
    lines = data.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    return lines[-count:] if count else []


def _decoded(lines: Sequence[bytes]) -> list[str]:
    return [line.decode("utf-8", "replace") for line in lines]


async def _print(
    output: Output, path: Path, lines: list[str], name_width: int, *, as_json: bool
) -> None:
    for line in lines:
        if as_json:
            line = json.dumps({"log": path.stem, "line": line}, ensure_ascii=False)
        elif name_width:
            line = f"{path.stem:{name_width}} | {line}"
        await output.data(line + "\n")
