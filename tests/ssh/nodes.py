"""What the tests of this directory start on a node, and how they see that it is gone."""

from __future__ import annotations

import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from rbee.guard import start_time
from rbee.ssh import Connection, RemoteDaemon, open_remote_daemon
from rbee.wire.messages import DaemonStart

PROGRAM = str(Path(__file__).with_name("daemon_program.py"))
LEASE = 3.0
GRACES = (1.5, 1.0)


def start(lease: float = LEASE) -> DaemonStart:
    return DaemonStart("queen-1", "s3cret", run_dir=f"h{secrets.token_hex(4)}", lease=lease)


@asynccontextmanager
async def open_planted(
    connection: Connection, how: str, home: str, *args: str, **given: Any
) -> AsyncIterator[RemoteDaemon]:
    async with open_remote_daemon(
        connection, [sys.executable, PROGRAM, how, *args], start(), graces=GRACES,
        log_file="hive.log", home=home, **given,
    ) as daemon:  # fmt: skip
        yield daemon


def pids(daemon: RemoteDaemon) -> list[int]:
    """Return the daemon's pids; the node is this machine."""
    return [daemon.hello.pid, daemon.hello.capabilities["child"]]


async def gone(*pids: int, within: float) -> None:
    with trio.fail_after(within):
        while any(start_time(pid) for pid in pids):
            await trio.sleep(0.02)
