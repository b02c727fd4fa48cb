"""An operator's queen: started detached, stopped until clean, told of."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from rbee import guard
from rbee.client import OPERATOR, AsyncClient
from rbee.errors import ConflictError, PeerError, RbeeError, UnavailableError
from rbee.home import Home, find_home, open_home, read_token, short_name, writing
from rbee.keeper.flags import DataFlags, ListenFlags
from rbee.keeper.output import note, print_data, print_json
from rbee.keeper.queen import (
    COMMAND,
    QueenAccess,
    open_running_queen,
    wait_unlocked,
)
from rbee.model import LOCALHOST, PROGRAM, Grace
from rbee.models.access import TOKENLESS
from rbee.process import own_environment
from rbee.running import find_run_file, queen_token
from rbee.sweep import sweep
from rbee.wire.messages import RunFile

START_LIMIT = 30.0
ACKNOWLEDGE_LIMIT = 2.0


@attrs.frozen
class Standing:
    """The queen that stands after ``queen start``; ``already`` says that it did before."""

    url: str
    pid: int
    already: bool


async def start_queen(home: Home, *, host: str, port: int) -> Standing:
    """Start a queen that outlives this command; it answers when this returns.

    Raises:
        ConflictError: the home's queen belongs to a running command.
        UnavailableError: it did not start; the message says why.
    """
    async with open_running_queen(home) as running:
        if running is not None:
            return _already(running)
    read_token(home)  # made here if there is none, where it can be told that there is no room
    log_file = home.log_file("queen")
    nonce = os.environ.get("RBEE_NONCE") or secrets.token_hex(8)
    with writing(home.logs), log_file.open("ab") as log:
        begin = log.tell()
        # Not `trio.run_process`: this child is to outlive us, and nothing of it is awaited.
        popen = subprocess.Popen(
            (*COMMAND, "--host", host, "--port", str(port)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **own_environment(home.root, nonce), **TOKENLESS},
        )
    began = guard.start_time(popen.pid)
    try:
        record = await _wait_until_up(home, popen)
        if record is None:
            raise _did_not_start(log_file, begin)
        async with open_running_queen(home) as access:
            if access is None:
                raise _did_not_start(log_file, begin)
    except BaseException:
        guard.send_signal(popen.pid, began, signal.SIGTERM)
        raise
    popen.returncode = 0  # it is nobody's child to wait for
    return Standing(record.url, record.pid, already=False)


def _already(running: QueenAccess) -> Standing:
    if running.owner != OPERATOR:
        raise ConflictError(
            f"the queen at {running.url} belongs to a running command ({running.owner}) "
            "and ends with it",
            code="queen_running",
            hint="rbee-keeper queen stop   # then start your own",
        )
    return Standing(running.url, running.health.pid, already=True)


async def _wait_until_up(home: Home, popen: subprocess.Popen[bytes]) -> RunFile | None:
    """Return what the queen wrote about itself; None if it ended instead."""
    with trio.move_on_after(START_LIMIT):
        while popen.poll() is None:
            record = find_run_file(home)
            if record is not None and record.pid == popen.pid:
                return record
            await trio.sleep(0.05)
    return None


def _did_not_start(log_file: Path, begin: int) -> UnavailableError:
    with suppress(OSError), log_file.open("rb") as file:
        file.seek(begin)
        text = file.read().decode("utf-8", "replace")
        lines = text.splitlines()
        error = next((line for line in reversed(lines) if line.startswith("error: ")), "")
        hint = next((line for line in reversed(lines) if line.startswith("  hint: ")), "")
        if error:
            why, hint = error.removeprefix("error: "), hint.removeprefix("  hint: ")
            return UnavailableError(f"queen-rbee did not start: {why}", hint=hint)
        return UnavailableError("queen-rbee did not start", hint=_see(log_file), log=text[-2000:])
    return UnavailableError("queen-rbee did not start", hint=_see(log_file))


def _see(log_file: Path) -> str:
    return f"tail -n 50 {shlex.quote(str(log_file))}"


async def stop_queen(home: Home) -> float | None:
    """End the home's queen and all below it; return the seconds it took, None if none ran.

    Raises:
        ConflictError: it is part of a program, which is not ours to end.
        PeerError: something of it is left although its time is over.
        MachineError: something does not end (code ``stuck``), or cannot be seen (``unverified``).
    """
    begin, waited = trio.current_time(), True
    with trio.move_on_after(Grace().keeper):
        waited = await wait_unlocked(home)
    record = find_run_file(home)
    if record is None:
        return trio.current_time() - begin if waited else None
    if record.owner.startswith(PROGRAM):
        raise ConflictError(
            f"the queen at {record.url} is part of a program (pid {record.pid}): it ends when "
            "that leaves its cluster",
            code="not_owned",
            hint=f"ps -p {record.pid}",
        )
    pidfds = {record.pid: os.pidfd_open(record.pid)}
    try:
        if not await _order_shutdown(home, record, pidfds):
            guard.send_signal(record.pid, record.start_time, signal.SIGTERM)
            # One that was stopped (Ctrl+Z, SIGSTOP) hears nothing until it goes on.
            guard.send_signal(record.pid, record.start_time, signal.SIGCONT)
        left = await _wait_gone(pidfds)
    finally:
        for pidfd in pidfds.values():
            os.close(pidfd)
    if left:
        pids = " ".join(map(str, sorted(left)))
        raise PeerError(
            f"of the queen at {record.url} there is still left after {Grace().keeper:.0f} s: "
            f"pid {pids}",
            code="not_stopped",
            hint=f"kill -9 {pids}",
        )
    await sweep(home.run / short_name(record.id))  # it has ended: its journal is nobody's
    return trio.current_time() - begin


async def _order_shutdown(home: Home, record: RunFile, pidfds: dict[int, int]) -> bool:
    """Order the end over HTTP, after noting which processes end with the queen."""
    token = queen_token(home, record, record.url)
    with trio.move_on_after(ACKNOWLEDGE_LIMIT), suppress(RbeeError):
        async with AsyncClient(record.url, token) as client:
            with suppress(RbeeError):
                for pid in await _owned_pids(client, record.id):
                    with suppress(OSError):
                        pidfds.setdefault(pid, os.pidfd_open(pid))
            await client.shutdown()
            return True
    return False


async def _owned_pids(client: AsyncClient, queen: str) -> list[int]:
    workers, hives = await client.workers(), await client.hives()
    pids = [worker.pid for worker in workers if (worker.owner, worker.node) == (queen, LOCALHOST)]
    pids += [hive.pid for hive in hives if (hive.owner, hive.node) == (queen, LOCALHOST)]
    return [pid for pid in pids if pid > 0]


async def _wait_gone(pidfds: dict[int, int]) -> set[int]:
    """Wait for the end of all; return what is left when the time is over."""
    left = set(pidfds)

    async def wait(pid: int) -> None:
        await trio.lowlevel.wait_readable(pidfds[pid])
        left.discard(pid)

    with trio.move_on_after(Grace().keeper):
        async with trio.open_nursery() as nursery:
            for pid in pidfds:
                nursery.start_soon(wait, pid)
    return left


async def print_start(flags: ListenFlags) -> None:
    """``queen start``."""
    home = open_home(flags.home)
    standing = await start_queen(home, host=flags.host, port=flags.port)
    if standing.already:
        note(f"a queen runs already (pid {standing.pid})")
    if flags.json:
        print_json(attrs.asdict(standing))
    else:
        print_data(standing.url)


async def print_stop(flags: DataFlags) -> None:
    """``queen stop``: the seconds on stdout."""
    seconds = await stop_queen(find_home(flags.home))
    if seconds is None:
        note("no queen running")
    if flags.json:
        print_json({"stopped": seconds is not None, "seconds": round(seconds or 0.0, 2)})
    elif seconds is not None:
        print_data(f"stopped in {seconds:.2f} s")


def queen_facts(access: QueenAccess | None) -> dict[str, Any]:
    """Describe a queen for ``queen status`` and ``status``."""
    if access is None:
        return {"state": "not running"}
    health = access.health
    return {
        "state": health.state,
        "url": access.url,
        "pid": health.pid,
        "id": health.id,
        "owner": health.owner,
        "version": health.version,
        "home": health.home,
    }
