"""The root of our daemons: signals, lifeline, logging, hello, and one way to end."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import attrs
import trio

from rbee import guard
from rbee.errors import ConflictError, RbeeError, UsageError, leaves
from rbee.home import check_token, write_atomic, writing
from rbee.log import configure_logging
from rbee.log_files import keep_own_log_short
from rbee.scopes import StopReason, cancel_on_signal, open_service
from rbee.wire import codec
from rbee.wire.messages import DaemonStart, Hello, RunFile

if TYPE_CHECKING:
    from cyclopts import App

log = logging.getLogger(__name__)


@attrs.define(eq=False)
class Root:
    """What a daemon's main is given: its scope, its owner, and why it ends."""

    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    start: DaemonStart | None = None
    stopped_by: StopReason = attrs.field(factory=StopReason)
    said_hello: bool = False
    owner_gone: bool = False
    last_resort: float = 9.0

    @property
    def owned(self) -> bool:
        return self.start is not None

    def stop(self, why: str) -> None:
        """Begin the end; safe to call again."""
        log.info("stopping: %s", why)
        self.scope.cancel(reason=why)

    def say_hello(self, hello: Hello) -> None:
        """Tell the owner that the next request would succeed; our output ends here."""
        log.info("%s %s listens at %s", hello.component, hello.id, hello.url)
        if self.owned and not self.said_hello:
            self.said_hello = True
            write_line(f"hello {codec.dumps(hello).decode()}")


def write_line(line: str) -> None:
    """Write the one line for the owner and send all further output to the log."""
    os.write(1, line.encode() + b"\n")
    os.dup2(2, 1)


def run_daemon(
    title: str,
    main: Callable[[Root], Awaitable[None]],
    *,
    owned: bool,
    prepare: Callable[[DaemonStart | None], None] = lambda start: None,
) -> int:
    """Run a daemon's main until it ends or is told to; return the exit code.

    Owned: the lifeline is stdin; its end, ``stop`` or a signal cancel the root. Otherwise stdin
    is not read.

    Args:
        prepare: what is to be done, with the owner's first line, while there is no loop yet.
    """
    import setproctitle  # here: a program that embeds a queen keeps its own title

    setproctitle.setproctitle(title)
    configure_logging(title)
    root = Root()
    try:
        rest = b""
        if owned:
            root.start, rest = _read_start()
        prepare(root.start)
        trio.run(_run, root, main, rest)
    except BaseException as exc:
        return _report(root, exc)
    return 0


def _read_start() -> tuple[DaemonStart, bytes]:
    try:
        given, rest = guard.read_start(0, 30)
    except (OSError, ValueError) as exc:
        raise UsageError(
            f"--owned needs an owner at stdin: {exc}", hint="leave --owned out to run by itself"
        ) from exc
    start = codec.structure(given, DaemonStart)
    check_token(start.token, "the owner's start line", hint="rbee-keeper queen start")
    return start, rest


async def _run(root: Root, main: Callable[[Root], Awaitable[None]], rest: bytes) -> None:
    # The watcher outlives the cleanup: a second SIGTERM must not meet the default handler.
    async with open_service(cancel_on_signal, root.scope, root.stopped_by):
        with root.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_exit_at_last, root.last_resort)
                if root.owned:
                    nursery.start_soon(_watch_lifeline, root, rest)
                else:
                    nursery.start_soon(keep_own_log_short)
                await main(root)
                nursery.cancel_scope.cancel(reason="daemon finished")


async def _watch_lifeline(root: Root, rest: bytes) -> None:
    """Cancel the root when the owner says stop, goes away, or talks nonsense."""
    lines = guard.Lines()
    data = rest
    os.set_blocking(0, False)
    while True:
        for line in lines.feed(data):
            if line == "stop":
                return root.stop("the owner said stop")
            if not line.startswith("beat "):
                return root.stop(f"unknown line {line[:40]!r} on the lifeline")
        await trio.lowlevel.wait_readable(0)
        data = os.read(0, 65536)
        if not data:
            root.owner_gone = True
            return root.stop("the owner is gone")


async def _exit_at_last(limit: float) -> None:
    """Leave with os._exit if the cleanup hangs longer than any budget allows."""
    try:
        await trio.sleep_forever()
    finally:
        timer = threading.Timer(limit, os._exit, (1,))
        timer.daemon = True
        timer.start()


def _report(root: Root, exc: BaseException) -> int:
    error = next((leaf for leaf in leaves(exc) if isinstance(leaf, RbeeError)), None)
    if error is None:
        log.error("ended by a bug", exc_info=exc)
        first = next(leaves(exc))
        error = RbeeError(f"{type(first).__name__}: {first}")
    elif root.owned:
        log.error("%s", error)
    if root.owned and not root.said_hello:
        detail = {"code": error.code, "message": error.message, "hint": error.hint}
        write_line(f"error {json.dumps(detail)}")
    elif not root.owned:
        print_error(error)
    return error.exit_code


def run_cli(app: App) -> NoReturn:
    """Run a program's command line and exit with its code."""
    from cyclopts import CycloptsError

    from rbee.sources import usage_error

    try:
        code = app(result_action="return_value", exit_on_error=False, print_error=False)
    except CycloptsError as exc:
        print_error(usage_error(exc, app))
        code = UsageError.exit_code
    except RbeeError as exc:
        print_error(exc)
        code = exc.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def print_error(error: RbeeError) -> None:
    """Say on stderr what failed and what to do next."""
    sys.stderr.write(f"error: {error.message}\n")
    if error.hint:
        sys.stderr.write(f"  hint: {error.hint}\n")


def ensure_nonce() -> str:
    """Return the mark that our children's first environment carries, made if there is none."""
    if "RBEE_NONCE" not in os.environ:
        os.environ["RBEE_NONCE"] = secrets.token_hex(8)
    os.environ["SPT_NOENV"] = "1"
    return os.environ["RBEE_NONCE"]


def write_run_file(path: Path, hello: Hello, owner: str, token_file: Path) -> None:
    """Tell where this daemon is to be found; call it under the daemon's lock."""
    pid = os.getpid()
    record = RunFile(
        component=hello.component, id=hello.id, url=hello.url, pid=pid,
        start_time=guard.start_time(pid), boot_id=guard.boot_id(), version=hello.version,
        owner=owner, token_file=str(token_file),
    )  # fmt: skip
    write_atomic(path, codec.dumps(record).decode())


def read_run_file(path: Path) -> RunFile | None:
    """Return the run file if its daemon lives on this machine, else None."""
    try:
        record = codec.loads(path.read_bytes(), RunFile)
    except (OSError, RbeeError):
        return None
    if record.boot_id != guard.boot_id() or not record.start_time:
        return None
    return record if guard.start_time(record.pid) == record.start_time else None


def remove_stale(run_file: Path, what: str) -> None:
    """Remove what a daemon that went down with its machine had written about itself."""
    if not run_file.exists() or read_run_file(run_file) is not None:
        return
    with suppress(ConflictError), locked(run_file, what):
        if read_run_file(run_file) is None:  # nobody has put his own in its place
            run_file.unlink(missing_ok=True)


@contextmanager
def locked(run_file: Path, what: str) -> Iterator[None]:
    """Hold the lock beside a daemon's run file; the kernel frees it when we die.

    Raises:
        ConflictError: another one of this home runs.
    """
    with writing(run_file.parent):
        fd = os.open(run_file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise _runs_already(run_file, what) from exc
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked off holds the same open file
        os.close(fd)


def _runs_already(run_file: Path, what: str) -> ConflictError:
    running = read_run_file(run_file)
    where = f" at {running.url} (pid {running.pid})" if running else ""
    return ConflictError(
        f"a {what} of this home runs already{where}",
        code=f"{what}_running",
        hint="rbee-keeper status",
    )
