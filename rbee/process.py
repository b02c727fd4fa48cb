"""Owned children: a daemon behind its guards, as a scope. Nothing is started bare.

Leaving `open_daemon` is the orderly end: a ``stop`` line, the lifeline closed, the guards' grace,
then SIGKILL by pidfd, then the journal's sweep for what a killed guard could not clean. It returns
when nothing is left.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import attrs
import trio

from rbee import guard
from rbee.errors import BadInputError, ChildExitedError, MachineError, PeerError, from_wire
from rbee.home import writing
from rbee.sweep import claim, sweep
from rbee.wire import codec
from rbee.wire.messages import DaemonStart, ErrorDetail, Hello

log = logging.getLogger(__name__)

T = TypeVar("T")

BEAT = 2.0
WAKE = 0.5
DYING = 2.0  # seconds for a killed process to go
GUARD = (sys.executable, "-I", "-S", guard.__file__)
LOG_TAIL = 2000


@attrs.define(eq=False)
class Lifeline:
    """The owner's end of a child's stdin: beats as long as we live, ``stop``, end of file."""

    fd: int

    def write(self, line: str) -> None:
        """Write a line or lose it: a frozen child must not block its owner."""
        if self.fd >= 0:
            try:
                os.write(self.fd, line.encode() + b"\n")
            except OSError as exc:
                log.debug("lifeline: %s", exc)

    async def keep_beating(self, every: float = BEAT) -> None:
        number = 0
        while True:
            number += 1
            self.write(f"beat {number}")
            await trio.sleep(every)

    def end(self) -> None:
        self.write("stop")
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@attrs.define(eq=False)
class Process:
    """A child process by pidfd; ``pid`` is its guard's if it has one."""

    pid: int
    pidfd: int
    lifeline: Lifeline
    _reap: Callable[[], Awaitable[int]]
    status: int | None = None

    def ended(self) -> bool:
        if self.status is None:
            poll = select.poll()  # unlike select() it takes any descriptor
            poll.register(self.pidfd, select.POLLIN)
            return bool(poll.poll(0))
        return True

    async def wait(self) -> int:
        """Return the exit code (128 + n for a signal) once the process has ended."""
        if self.status is None:
            await trio.lowlevel.wait_readable(self.pidfd)
            self.status = await self._reap()
        return self.status

    async def stop(self, grace: float) -> bool:
        """Ask, wait ``grace`` seconds, kill; return whether asking was enough."""
        self.lifeline.end()
        with trio.move_on_after(grace):
            await self._wait_awake()
        was_enough = self.ended()
        if not was_enough:
            log.warning("process %d did not end within %.1f s, killing it", self.pid, grace)
            self.signal(signal.SIGKILL)
        with trio.move_on_after(DYING):  # one that is stuck in the kernel goes later
            await self.wait()  # reaps it
        return was_enough

    async def _wait_awake(self) -> None:
        """Wait for the end; one that is frozen now or later is woken to hear of it."""
        while not self.ended():
            self.signal(signal.SIGCONT)
            with trio.move_on_after(WAKE):
                await self.wait()

    def signal(self, number: int) -> None:
        guard.signal_pidfd(self.pidfd, number)

    def close(self) -> None:
        self.lifeline.close()
        os.close(self.pidfd)


@attrs.define(eq=False)
class Daemon:
    """An owned daemon that said hello."""

    process: Process
    hello: Hello
    log: Path

    async def wait(self) -> int:
        return await self.process.wait()

    def ended(self, status: int) -> ChildExitedError:
        """Make the error for an end that nobody asked for."""
        return child_exited(self.hello.component, status, self.log)


@asynccontextmanager
async def open_guarded(
    argv: Sequence[str],
    *,
    first: str = "",
    graces: Sequence[float],
    log_file: Path,
    run_dir: Path | None = None,
    lease: float = 0.0,
    env: Mapping[str, str] | None = None,
    run_file: Path | None = None,
    adopt_grace: float = 0.0,
    die_with_us: bool = False,
    piped: bool = False,
    hold_interrupt: bool = False,
    orphaned: Sequence[Path] = (),
) -> AsyncGenerator[tuple[Process, IO[bytes] | None], None]:
    """Run ``argv`` below one guard per grace (outermost first) while the body runs.

    Args:
        first: the line sent to the command on its stdin.
        graces: seconds between TERM and KILL of each guard, outermost first.
        run_dir: journal directory of this child, removed by its guards at the end.
        lease: seconds without our beat after which the outermost guard ends it (each inner one
            allows a second more); 0 = none.
        die_with_us: the guard also ends when the thread that called us ends, and the command, by
            the kernel, when its guard ends.
        hold_interrupt: whether the command is a program of ours, which takes SIGINT when it can.
        orphaned: what of ours its guards are to remove at the end if we are gone by then.
        piped: yield the command's output; otherwise it goes to the log as well.

    Yields the outermost guard's process and, if asked for, the command's output.
    """
    environment = {**os.environ, "SPT_NOENV": "1", **(env or {})}
    line = guard_lines(
        argv, first=first, graces=graces, log_file=log_file, run_dir=run_dir, lease=lease,
        run_file=run_file, adopt_grace=adopt_grace, parent=os.getpid() if die_with_us else 0,
        hold_interrupt=hold_interrupt, die_with_guard=die_with_us, orphaned=orphaned,
    )  # fmt: skip
    try:
        with writing(log_file.parent), log_file.open("ab") as stderr:
            popen = _popen_guard(subprocess.PIPE if piped else stderr, stderr, environment)
    except MachineError:
        if run_dir is not None:  # claimed for whom there will not be
            shutil.rmtree(run_dir, ignore_errors=True)
        raise
    process = _own(popen)
    try:
        await _send_start(process, line)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.lifeline.keep_beating)
            try:
                yield process, popen.stdout
            finally:
                nursery.cancel_scope.cancel(reason="the body ended")
    finally:
        try:
            # Bounded: the guard inside kills at its own grace, `stop` kills the guard after.
            with trio.move_on_after(2 * graces[0] + 3 * DYING, shield=True):
                guard_lived = not process.ended()
                await process.stop(graces[0] + 0.5)
                if run_dir is not None:
                    # A command that has just lost its guard is on its way out by itself.
                    await sweep(run_dir, patience=0 if guard_lived else graces[-1])
        finally:  # also if something of it does not end
            if popen.stdout is not None:
                popen.stdout.close()
            process.close()


def _popen_guard(
    stdout: IO[bytes] | int, stderr: IO[bytes], env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    if not hasattr(os, "pidfd_open"):  # before anything is started
        raise MachineError(
            f"a daemon of rbee runs on Linux 5.3 or later, this machine runs {sys.platform}: its "
            "processes could not be held for sure",
            hint="rbee-keeper --help   # --queen-url takes a queen on a Linux machine",
        )
    try:
        # In trio's own thread: PR_SET_PDEATHSIG follows the forking thread (no trio.run_process).
        with guard.held_interrupt():
            return subprocess.Popen(
                GUARD, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, env=env,
                start_new_session=True,
            )  # fmt: skip
    except OSError as exc:  # no memory, or too many processes
        raise MachineError(f"cannot start a guard: {exc.strerror}") from exc


def _own(popen: subprocess.Popen[bytes]) -> Process:
    assert popen.stdin is not None
    lifeline = Lifeline(os.dup(popen.stdin.fileno()))
    os.set_blocking(lifeline.fd, False)
    popen.stdin.close()

    async def reap() -> int:
        code = popen.wait()  # it has ended: no waiting
        return code if code >= 0 else 128 - code

    return Process(popen.pid, os.pidfd_open(popen.pid), lifeline, reap)


async def _send_start(process: Process, line: str) -> None:
    data = memoryview(line.encode() + b"\n")
    while data:
        try:
            data = data[os.write(process.lifeline.fd, data) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(process.lifeline.fd)
        except BrokenPipeError:
            return  # it ended already; whoever waits for it sees how


def guard_lines(
    argv: Sequence[str],
    *,
    first: str,
    graces: Sequence[float],
    log_file: Path,
    run_dir: Path | None,
    lease: float,
    run_file: Path | None = None,
    adopt_grace: float = 0.0,
    parent: int = 0,
    hold_interrupt: bool = False,
    die_with_guard: bool = False,
    clock: str = "monotonic",
    orphaned: Sequence[Path] = (),
    guard_argv: Sequence[str] = GUARD,
) -> str:
    """Nest one plan per guard, the innermost around the command itself; return the first line."""
    names = ["guard"] if len(graces) == 1 else [f"guard-{chr(97 + i)}" for i in range(len(graces))]
    command, line = list(argv), first
    for depth in reversed(range(len(graces))):
        innermost = depth == len(graces) - 1
        plan: dict[str, Any] = {
            "name": names[depth],
            "argv": command,
            "first": line,
            "lease": lease + depth if lease else 0,
            "clock": clock,
            "grace": graces[depth],
            "log": str(log_file),
            "parent": parent if depth == 0 else 0,
            "inner": depth > 0,
            "adopt_grace": adopt_grace if innermost else 0,
            "cap_log": innermost,
            "hold_interrupt": hold_interrupt or not innermost,
            "die_with_guard": die_with_guard and innermost,
        }
        if run_dir is not None:
            plan |= {"record": str(run_dir), "remove": [str(run_dir)]}
        if orphaned:
            owner = os.getpid()
            plan |= {
                "owner": [owner, guard.start_time(owner)],
                "orphaned": list(map(str, orphaned)),
            }
        if run_file is not None and innermost:
            plan["run_file"] = str(run_file)
        command, line = list(guard_argv), f"start {json.dumps(plan)}"
    return line


@asynccontextmanager
async def open_daemon(
    argv: Sequence[str],
    start: DaemonStart,
    *,
    graces: Sequence[float],
    log_file: Path,
    env: Mapping[str, str] | None = None,
    run_file: Path | None = None,
    adopt_grace: float = 0.0,
    orphaned: Sequence[Path] = (),
) -> AsyncGenerator[Daemon, None]:
    """Own a queen or a hive while the body runs; it has said hello before the body starts.

    Raises:
        RbeeError: the daemon said why it cannot start.
        ChildExitedError: it ended without a word; the message holds its log's tail.
    """
    run_dir = Path(start.run_dir)
    with writing(run_dir):
        claim(run_dir)
    async with open_guarded(
        argv, first=f"start {codec.dumps(start).decode()}", graces=graces, log_file=log_file,
        run_dir=run_dir, lease=start.lease, env=env, run_file=run_file, adopt_grace=adopt_grace,
        piped=True, hold_interrupt=True, orphaned=orphaned,
    ) as (process, output):  # fmt: skip
        assert output is not None
        hello = await _read_hello(process, output, log_file)
        yield Daemon(process, hello, log_file)


async def _read_hello(process: Process, output: IO[bytes], log_file: Path) -> Hello:
    data = b""
    os.set_blocking(output.fileno(), False)
    while b"\n" not in data:
        await trio.lowlevel.wait_readable(output.fileno())
        more = os.read(output.fileno(), 65536)
        if not more:
            raise child_exited(log_file.stem, await process.wait(), log_file)
        data += more
    line = data.partition(b"\n")[0].decode("utf-8", "replace")
    kind, _, text = line.partition(" ")
    if kind == "hello":
        return _said(text, Hello)
    if kind == "error":
        error = _said(text, ErrorDetail)
        raise from_wire(error.code, error.message, hint=error.hint, details=error.details)
    raise PeerError(f"expected hello from the daemon, got {line[:80]!r}")


def _said(text: str, kind: type[T]) -> T:
    try:
        return codec.loads(text, kind)
    except BadInputError as exc:
        raise PeerError(f"the daemon talks nonsense: {exc.message}") from exc


def child_exited(what: str, status: int, log_file: Path) -> ChildExitedError:
    """Describe an end that nobody asked for, with the log's tail."""
    return ChildExitedError(
        f"{what} ended unasked with {how_ended(status)}",
        hint=f"tail -n 50 {shlex.quote(str(log_file))}",
        log=log_tail(log_file),
    )


def how_ended(status: int) -> str:
    """Say an exit code (128 + n for a signal) in words."""
    return f"signal {signal.Signals(status - 128).name}" if 128 < status < 160 else f"code {status}"


def log_tail(path: Path, size: int = LOG_TAIL) -> str:
    """Return the last whole lines of a log, at most ``size`` bytes; "" if there is none."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            text = file.read(size).decode("utf-8", "replace")
    except OSError:
        return ""
    if end <= size:
        return text
    return text.partition("\n")[2] or text  # of a very long line, its end


async def run_program(
    argv: Sequence[str],
    *,
    log_file: Path,
    env: Mapping[str, str] | None = None,
    grace: float = 2.0,
) -> int:
    """Run one guarded program to its end and return its exit code; cancelling ends it."""
    try:
        async with open_guarded(
            argv, graces=[grace], log_file=log_file, env=env, die_with_us=True
        ) as (process, _):
            return await process.wait()
    except BaseExceptionGroup as group:
        raise _only(group) from None


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    return group.exceptions[0] if len(group.exceptions) == 1 else group


def own_environment(home: Path, nonce: str) -> dict[str, str]:
    """Return what must be in the first environment of every process of ours."""
    return {"RBEE_HOME": str(home), "RBEE_NONCE": nonce, "SPT_NOENV": "1"}
