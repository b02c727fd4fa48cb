"""Whether a worker has a model: told by the kernel, whoever's worker it is.

A hive holds ``.in-use/NAME`` shared for as long as a worker of its has the directory ``NAME`` of
the catalog. Who removes or replaces that directory takes the same file exclusively, or refuses. A
hive that dies, however it does, holds nothing any more.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import trio

from rbee.errors import ConflictError, MachineError
from rbee.models.locks import EXCLUSIVE, SHARED, lock_file, try_lock, unlock, unshare

log = logging.getLogger(__name__)

POLL = 0.1
TRIES, PAUSE = 4, 0.01  # who only looks holds the lock for a moment
_AREA = ".in-use"


async def share(models: Path, name: str, held: ExitStack) -> None:
    """Keep a model from being removed until ``held`` closes; wait while somebody is at it."""
    try:
        path = lock_file(models, _AREA, name)
        fd = try_lock(path, SHARED)
        while fd is None:
            # whoever has it exclusively removes or replaces the directory just now
            await trio.sleep(POLL)
            fd = try_lock(path, SHARED)
    except MachineError as exc:  # nobody of us can remove it from a disk that cannot be written
        log.warning("%s is used without a lock: %s", name, exc)
        return
    held.callback(unshare, path, fd)


@contextmanager
def unused(models: Path, name: str) -> Iterator[None]:
    """Keep a model from being taken into use, or raise `ConflictError` if a worker has it."""
    path = lock_file(models, _AREA, name)
    for attempt in range(TRIES):
        if (fd := try_lock(path)) is not None:
            break
        if attempt < TRIES - 1:
            time.sleep(PAUSE)
    else:
        raise ConflictError(
            f"{name} is in use: a running worker has loaded it",
            code="model_in_use",
            hint="rbee-keeper worker list   # then rbee-keeper worker stop WORKER",
        )
    try:
        yield
    finally:
        unlock(path, fd)


def refuse_if_used(models: Path, name: str) -> None:
    """Raise `ConflictError` if a worker has a model; before work that would be in vain."""
    with unused(models, name):
        pass


def is_used(models: Path, name: str) -> bool:
    """Tell whether a worker has a model; writes nothing."""
    try:
        fd = os.open(models / _AREA / name, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, EXCLUSIVE | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
