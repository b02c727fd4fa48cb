"""The files below ``$RBEE_HOME/logs``: kept short by whoever writes them, and few."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Container
from pathlib import Path

import trio

from rbee import guard
from rbee.home import find_home

KEPT = 30
LOOK = 5.0


def prune_logs(directory: Path, kind: str, *, running: Container[str] = ()) -> None:
    """Keep the newest logs ``kind-*.log`` and those named ``running``; others may be at it too."""
    logs = [(_modified(path), path) for path in directory.glob(f"{kind}-*.log*")]
    for _, path in sorted(logs)[:-KEPT]:
        if path.name.removesuffix(".1") not in running:
            path.unlink(missing_ok=True)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


async def keep_own_log_short() -> None:
    """Cap the log that our stderr appends to, if it is one of our home's and no guard does it."""
    path = own_log()
    while path is not None:
        guard.cap_log(str(path))
        await trio.sleep(LOOK)


def own_log() -> Path | None:
    """Return the log of our home that stderr appends to; None if it goes anywhere else.

    What an operator has redirected is the operator's to keep short.
    """
    try:
        path = Path("/proc/self/fd/2").readlink()
        appends = fcntl.fcntl(2, fcntl.F_GETFL) & os.O_APPEND
    except OSError:  # closed
        return None
    return path if appends and path.parent == find_home().logs.resolve() else None
