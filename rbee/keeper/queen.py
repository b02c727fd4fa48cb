"""Which queen a command uses: the one asked for, the one that runs, or one of its own."""

from __future__ import annotations

import fcntl
import os
import secrets
import shlex
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio

from rbee import __version__, guard
from rbee.client import KEEP_A_QUEEN, AsyncClient
from rbee.config import Config
from rbee.errors import (
    ConflictError,
    OwnerGoneError,
    PeerError,
    RbeeError,
    UnavailableError,
    leaves,
)
from rbee.home import Home, short_name, writing
from rbee.model import Grace, new_id
from rbee.running import find_run_file, queen_token
from rbee.wire.messages import DaemonStart, Health, RunFile

if TYPE_CHECKING:
    from rbee.process import Daemon

HEALTH_LIMIT = 2.0
DEATH_SHOWS_WITHIN = 1.0
COMMAND = (sys.executable, "-m", "rbee.queen", "daemon")


@attrs.frozen
class QueenAccess:
    """A queen that answers. ``owned``: it is our child and ends with the block it came from."""

    client: AsyncClient
    url: str
    owned: bool
    health: Health

    @property
    def owner(self) -> str:
        return self.health.owner


@asynccontextmanager
async def open_queen(
    home: Home,
    config: Config,
    *,
    url: str = "",
    token_file: str = "",
    check: Callable[[], None] = lambda: None,
) -> AsyncGenerator[QueenAccess, None]:
    """Use the queen at ``url``, else the home's running one, else own one while the body runs.

    Args:
        check: raises what would make a queen of our own pointless, before it is started.

    Raises:
        UnavailableError: the queen asked for, or the one that runs, does not answer.
        ConflictError: the home's queen is of another version.
        ChildExitedError: our own queen died although nobody asked it to.
    """
    async with AsyncExitStack() as stack:
        opened = open_running_queen(home, url=url, token_file=token_file)
        access = await stack.enter_async_context(opened)
        if access is None:
            check()
        yield access or await _enter_own(stack, home, config)


@asynccontextmanager
async def open_running_queen(
    home: Home, *, url: str = "", token_file: str = "", any_version: bool = False
) -> AsyncGenerator[QueenAccess | None, None]:
    """Yield the queen at ``url`` or the home's running one; None if none runs."""
    record = find_run_file(home)
    where = url.rstrip("/") or (record.url if record else "")
    if not where:
        yield None
        return
    token = queen_token(home, record, where, token_file)
    async with AsyncClient(where, token) as client:
        health = await _health(client, record if not url else None)
        if health is None:
            yield None
            return
        if not any_version:
            _check(health, home if not url else None, where)
        yield QueenAccess(client, where, owned=False, health=health)


async def _health(client: AsyncClient, record: RunFile | None) -> Health | None:
    """Ask the queen who it is; None if it was just ending and is gone now."""
    why = f"no answer within {HEALTH_LIMIT:.0f} s"
    with trio.move_on_after(HEALTH_LIMIT) as scope:
        try:
            health = await client.health()
            if health.state != "stopping":
                return health
            why = "it is stopping"
        except (UnavailableError, PeerError) as exc:
            why = exc.message
    # A frozen queen is told of at once; one that has closed its listener gets the time to end.
    if record and not scope.cancelled_caught and await ended(record, Grace().queen):
        return None
    raise _no_answer(client.url, record, why)


async def ended(record: RunFile, limit: float) -> bool:
    """Wait until the process behind a run file is gone; False if it is not within ``limit``."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return True
    try:
        with trio.move_on_after(limit):
            if guard.start_time(record.pid) == record.start_time:
                await trio.lowlevel.wait_readable(pidfd)
            return True
        return False
    finally:
        os.close(pidfd)


def _no_answer(url: str, record: RunFile | None, why: str) -> UnavailableError:
    if record is None:
        return UnavailableError(
            f"no queen answers at {url}: {why}",
            code="unreachable",
            hint=f"curl {shlex.quote(url)}/health",
        )
    return UnavailableError(
        f"the queen of this home (pid {record.pid}, {url}) does not answer: {why}",
        code="unreachable",
        hint="rbee-keeper queen stop   # then try again",
    )


def _check(health: Health, home: Home | None, url: str) -> None:
    if health.version != __version__:
        raise ConflictError(
            f"the queen at {url} (pid {health.pid}) is of version {health.version}, "
            f"this rbee-keeper is of {__version__}",
            code="other_version",
            hint="rbee-keeper queen stop",
        )
    if home is not None and health.home and Path(health.home) != home.root:
        raise ConflictError(
            f"the queen at {url} serves {health.home}, not {home.root}",
            code="other_home",
            hint=f"rbee-keeper queen status --home {shlex.quote(health.home)}",
        )


async def wait_unlocked(home: Home) -> bool:
    """Wait while a queen runs that wrote no run file yet, or has removed it; False if none does."""
    lock, waited = home.queen_file.with_suffix(".lock"), False
    while not home.queen_file.exists() and _is_locked(lock):
        waited = True
        await trio.sleep(0.05)  # nobody tells of a lock's end
    return waited


def _is_locked(path: Path) -> bool:
    """Look without taking the lock: a queen that is just starting would find it taken."""
    try:
        inode = path.stat().st_ino
        return any(
            line.split()[5].endswith(f":{inode}")
            for line in Path("/proc/locks").read_text().splitlines()
            if " FLOCK " in line
        )
    except (OSError, IndexError):
        return False


# a queen of our own ---------------------------------------------------------------------------
async def _enter_own(stack: AsyncExitStack, home: Home, config: Config) -> QueenAccess:
    """Own a queen, or use the one that another command was quicker to start.

    A queen that is just ending still holds the home's lock; its end is waited for.
    """
    deadline = trio.current_time() + Grace().keeper
    async with _spawn_lock(home):
        while True:
            running = await stack.enter_async_context(open_running_queen(home))
            if running is not None:
                return running
            try:
                return await stack.enter_async_context(_open_own_queen(home, config))
            except (RbeeError, BaseExceptionGroup) as exc:
                if not _is_running(exc) or trio.current_time() > deadline:
                    raise
            await trio.sleep(0.1)


def _is_running(exc: BaseException) -> bool:
    return any(isinstance(e, RbeeError) and e.code == "queen_running" for e in leaves(exc))


@asynccontextmanager
async def _spawn_lock(home: Home) -> AsyncGenerator[None, None]:
    """Let one command of this home at a time look for a queen and start it."""
    with writing(home.run):
        fd = os.open(home.run / "spawn.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Asked again and again: a thread that waits in flock could not be cancelled.
        while not _try_lock(fd):  # noqa: ASYNC110
            await trio.sleep(0.05)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@asynccontextmanager
async def _open_own_queen(home: Home, config: Config) -> AsyncGenerator[QueenAccess, None]:
    """Own a queen while the body runs; raise `ChildExitedError` if it dies unasked."""
    from rbee.models.access import TOKENLESS
    from rbee.process import open_daemon, own_environment

    start = DaemonStart(
        owner=new_id("keeper"),
        token=secrets.token_hex(24),
        run_dir=str(home.run / short_name(new_id("queen"))),
        lease=config.queen.lease,
    )
    nonce = os.environ.get("RBEE_NONCE") or secrets.token_hex(8)
    async with (
        open_daemon(
            (*COMMAND, "--owned", "--port", str(config.queen.port)),
            start,
            graces=(Grace().queen_guard,),
            log_file=home.log_file("queen"),
            env=own_environment(home.root, nonce) | TOKENLESS,
            run_file=home.queen_file,
        ) as daemon,
        _reporting_death(daemon, config.queen.lease),
        AsyncClient(daemon.hello.url, start.token) as client,
    ):
        yield QueenAccess(client, daemon.hello.url, owned=True, health=_health_of(daemon, start))


def _health_of(daemon: Daemon, start: DaemonStart) -> Health:
    hello = daemon.hello
    return Health(hello.component, hello.id, hello.version, start.owner, "", hello.pid)


@asynccontextmanager
async def _reporting_death(daemon: Daemon, lease: float) -> AsyncGenerator[None, None]:
    """Cancel the body and raise what happened when the daemon ends before it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_raise_when_dead, daemon, lease)
        try:
            yield
        except (PeerError, UnavailableError) as exc:
            # A dead queen's stream breaks before its death is seen, and explains nothing. One
            # that was told to end by somebody else says so and then stops what it owns.
            ending = isinstance(exc, OwnerGoneError)
            await trio.sleep(Grace().queen if ending else DEATH_SHOWS_WITHIN)
            raise
        nursery.cancel_scope.cancel(reason="done with the queen")


async def _raise_when_dead(daemon: Daemon, lease: float) -> None:
    pauses = Pauses()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pauses.keep_watching)
        error = daemon.ended(await daemon.wait())
        if (pause := pauses.longest()) > lease:
            error.message += (
                f": this command was stopped for {pause:.0f} s, and a queen that a command owns "
                f"ends when its owner is silent for {lease:.0f} s"
            )
            error.hint = KEEP_A_QUEEN
        raise error


class Pauses:
    """See for how long this process did not run (Ctrl+Z, a frozen machine)."""

    def __init__(self) -> None:
        self._last = trio.current_time()
        self._longest = 0.0

    async def keep_watching(self, every: float = 1.0) -> None:
        while True:
            await trio.sleep(every)
            self.longest()

    def longest(self) -> float:
        now = trio.current_time()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        return self._longest
