"""What the command line prints: the only module that does.

stdout is data, stderr is narration. While a command runs in trio it writes through `Output`, whose
writes wait for a slow reader without blocking the thread: a keeper whose pipe is full must still
hear SIGTERM.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from rbee.errors import MachineError, RbeeError
from rbee.printable import printable, printable_lines

if TYPE_CHECKING:  # the quick way to an answer has no steps, so it does not pay for their import
    from rbee.keeper.progress import Step

DIM, RED, PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[0m"
CLEAR_LINE, CLEAR_REST = "\r\x1b[K", "\x1b[K"
DUMB = ("", "dumb", "unknown")
COLUMNS = 80  # of a terminal that does not know
REDRAW = 0.2  # seconds between two drawings of the live line
TELL = 5.0  # seconds between two lines of progress where there is no live line
LONG = 1.0  # seconds from which a step's end is told there


class StdoutClosedError(RbeeError):
    """Whoever read our stdout has had enough (``| head -1``): not a failure."""

    code = "stdout_closed"
    exit_code = 0


class ToldError(RbeeError):
    """A failure that was told already; only its exit code is left to give."""

    code = "told"


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


class Sink:
    """Text on its way to a file descriptor; `put` never waits, what does not fit is kept."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._left = b""
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    @property
    def is_idle(self) -> bool:
        return not self._left

    def put(self, text: str) -> None:
        self._left += text.encode("utf-8", "replace")
        try:
            while self._left and self._poll.poll(0):
                self._left = self._left[os.write(self._fd, self._left[: select.PIPE_BUF]) :]
        except OSError:  # narration is no reason to fail
            self._left = b""

    async def flush(self) -> None:
        """Wait for a slow reader; cancellable."""
        import trio

        while self._left:
            await trio.lowlevel.wait_writable(self._fd)
            self.put("")


class Output:
    """The two streams of a running command; `open_output` makes one whose seconds go on.

    On a terminal the current step is one live line below everything else; it stays, with its
    seconds, when the step is over. Elsewhere each step is a line when it begins, one every few
    seconds while its progress is told, and one at its end if it took long.

    Args:
        quiet_data: keep tokens off stdout (``--json`` prints one object at the end).
    """

    def __init__(self, *, quiet_data: bool = False) -> None:
        self._quiet_data = quiet_data
        self._line_open = False  # data has been written since the last newline
        self._colours = colours(sys.stderr)
        self._share_terminal = is_terminal(sys.stdout) and is_terminal(sys.stderr)
        self._stderr = Sink(2)
        self._step: Step | None = None
        self._drawn = False
        self._told_at = 0.0
        self.is_live = is_terminal(sys.stderr) and os.environ.get("TERM", "dumb") not in DUMB

    async def data(self, text: str) -> None:
        """Write answer text at once; raise `StdoutClosedError` when nobody reads any more."""
        if self._quiet_data or not text:
            return
        if self._step is not None:
            self.end_step()
            await self._stderr.flush()
        try:
            await write(1, text.encode("utf-8", "replace"))
        except OSError as exc:
            raise stdout_error(exc) from exc
        self._line_open = not text.endswith("\n")

    def settle(self) -> None:
        """End the step and the line that `data` has left open; also while being cancelled, so
        never waits."""
        self.end_step()
        if self._line_open:
            self._line_open = False
            Sink(1).put("\n")

    # narration -------------------------------------------------------------------------------
    async def narrate(self, actor: str, action: str, text: str, share: float | None = None) -> None:
        """Tell what is going on from now on, or how far it is (``share``, 0 … 1)."""
        self.step(actor, action, text, share)
        await self._stderr.flush()

    async def tell(self, line: str) -> None:
        """Tell what is so, not what is going on."""
        self.end_step()
        self._put_line(line)
        await self._stderr.flush()

    def step(self, actor: str, action: str, text: str, share: float | None = None) -> None:
        """Do as `narrate` does without waiting: for callbacks."""
        text = printable(text)
        if self._step is not None and self._step.take(actor, action, text, share):
            self._tell_progress(self._step)
            return
        from rbee.keeper.progress import FACTS, Step

        self.end_step()
        step = Step(actor, action, text, time.monotonic(), share)
        if action in FACTS:
            self._put_line(step.name)
            return
        self._step = step
        if self.is_live:
            self.draw()
        else:
            self._put_told(step)

    def await_answer(self, actor: str, text: str, action: str = "answer") -> None:
        """Show on a terminal that an answer is awaited; nothing of it stays."""
        if self.is_live:
            from rbee.keeper.progress import Step

            self.end_step()
            self._step = Step(actor, action, text, time.monotonic(), stays=False)

    def end_step(self) -> None:
        step, self._step = self._step, None
        drawn, self._drawn = self._drawn, False
        if step is None:
            return
        now = time.monotonic()
        if drawn:
            self._stderr.put(CLEAR_LINE)
        if step.stays and (self.is_live or now - step.began >= LONG):
            self._put_line(step.over(now))

    def draw(self) -> None:
        """Show the step as it is now, unless the terminal is slow."""
        if self._step is None or not self._stderr.is_idle:
            return
        line = self._dimmed(self._step.line(time.monotonic(), columns()))
        self._stderr.put(f"{self._newline()}\r{line}{CLEAR_REST}")
        self._drawn = True

    async def keep_drawing(self) -> None:
        import trio

        while True:
            await trio.sleep(REDRAW)
            self.draw()

    def _tell_progress(self, step: Step) -> None:
        if self.is_live:
            self.draw()
        elif time.monotonic() - self._told_at >= TELL:
            self._put_told(step)

    def _put_told(self, step: Step) -> None:
        self._told_at = time.monotonic()
        self._put_line(step.told())

    def _put_line(self, line: str) -> None:
        self._stderr.put(f"{self._newline()}{self._dimmed(line)}\n")

    def _dimmed(self, line: str) -> str:
        return f"{DIM}{line}{PLAIN}" if self._colours else line

    def _newline(self) -> str:
        """Leave the answer's line, where stdout and stderr are one terminal."""
        if not (self._line_open and self._share_terminal):
            return ""
        self._line_open = False
        return "\n"


@asynccontextmanager
async def open_output(*, quiet_data: bool = False) -> AsyncGenerator[Output, None]:
    """Make an `Output` that shows a step's seconds go by; the terminal is clean afterwards.

    On a terminal the body runs in a nursery, so its errors come in a group.
    """
    output = Output(quiet_data=quiet_data)
    try:
        if output.is_live:
            async with _drawing(output):
                yield output
        else:
            yield output
    finally:
        output.settle()


@asynccontextmanager
async def _drawing(output: Output) -> AsyncGenerator[None, None]:
    import trio

    async with trio.open_nursery() as nursery:
        nursery.start_soon(output.keep_drawing)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel(reason="the command has ended")


def columns() -> int:
    try:
        return os.get_terminal_size(2).columns or COLUMNS
    except OSError:
        return COLUMNS


# at the end, outside of trio ----------------------------------------------------------------------
def print_error(error: RbeeError) -> None:
    """Print ``error: …`` and ``  hint: …``."""
    red, plain = (RED, PLAIN) if colours(sys.stderr) else ("", "")
    lines = [f"{red}error:{plain} {printable_lines(error.message)}"]
    if log := str(error.details.get("log", "")).rstrip():
        told = [line for line in log.splitlines() if line not in error.message]
        lines += [f"  log: {printable(line)}" for line in told]
    if error.hint:
        lines.append(f"  hint: {printable_lines(error.hint)}")
    _print_told("\n".join(lines))


def stdout_error(exc: OSError) -> RbeeError:
    """Make the error of a stdout that takes no more."""
    if isinstance(exc, BrokenPipeError):
        return StdoutClosedError("stdout is closed")
    return MachineError(f"cannot write to stdout: {exc.strerror}", hint="df -h .")


def note(text: str) -> None:
    """Print a line on stderr."""
    _print_told(printable_lines(text))


def _print_told(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def print_data(text: str) -> None:
    """Print a line on stdout; raise an error when it takes no more."""
    try:
        print(text, flush=True)
    except OSError as exc:
        # What is left in the buffer would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise stdout_error(exc) from exc


def print_json(value: Any) -> None:
    print_data(json.dumps(value, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Print aligned columns with their names on top."""
    cells = [[name.upper().replace("_", " ") for name in columns]]
    cells += [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print_data("  ".join(map(str.ljust, line, widths)).rstrip())


def _cell(value: Any) -> str:
    return "-" if value is None else printable(str(value)) or "-"


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
        text = "-" if value in ("", None) else printable_lines(str(value))
        print_data(f"{name.replace('_', ' ') + ':':{width}} {text}")


def human_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
