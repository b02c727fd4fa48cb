"""Locks that the kernel keeps: a file below the models directory, gone with whoever held it.

They live beside the models, not in the run directory: what must not happen twice is a write there,
and a home may be shared by several machines. Descriptors are close-on-exec, so no child of the
holder has them.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from rbee.home import writing

EXCLUSIVE, SHARED = fcntl.LOCK_EX, fcntl.LOCK_SH


def lock_file(models: Path, area: str, name: str) -> Path:
    """Return the file to lock for ``name``; its directory is made."""
    path = models / area / name
    with writing(models):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def try_lock(path: Path, kind: int = EXCLUSIVE) -> int | None:
    """Return a descriptor that holds the lock, None if somebody else is in the way."""
    with writing(path.parent):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        # its last holder may have removed the file that was locked here
        if os.path.samestat(os.fstat(fd), path.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return None


def unlock(path: Path, fd: int) -> None:
    """Give an exclusive lock back; its file goes too."""
    with suppress(OSError):
        path.unlink()
    os.close(fd)


def unshare(path: Path, fd: int) -> None:
    """Give a shared lock back; the last one removes its file."""
    try:
        fcntl.flock(fd, EXCLUSIVE | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.stat()):
            path.unlink()
    except OSError:  # others have it, or the file is gone
        pass
    finally:
        os.close(fd)
