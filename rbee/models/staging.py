"""Files that appear whole or not at all: a lock per target, a staging directory, one rename.

Both live below the models directory itself (see `locks`).
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import trio

from rbee.errors import ConflictError
from rbee.home import writing
from rbee.models.locks import lock_file, try_lock, unlock
from rbee.models.use import unused

PARTIAL = ".partial"
POLL = 0.1
CLEANUP = 5.0
_AREA = ".locks"


@asynccontextmanager
async def open_lock(
    models: Path, name: str, *, waiting: Callable[[], None] = lambda: None
) -> AsyncGenerator[None, None]:
    """Hold the lock of one target against other tasks and processes.

    ``waiting`` is called once if somebody else has it. It is gone with the process that held it.
    """
    path = lock_file(models, _AREA, name)
    fd = try_lock(path)
    if fd is None:
        waiting()
    while fd is None:
        # a blocking flock in a thread could be neither cancelled nor abandoned safely
        await trio.sleep(POLL)
        fd = try_lock(path)
    try:
        yield
    finally:
        unlock(path, fd)


@contextmanager
def lock_now(models: Path, name: str) -> Iterator[None]:
    """Hold the lock of one target, or raise `ConflictError` if somebody else does."""
    path = lock_file(models, _AREA, name)
    fd = try_lock(path)
    if fd is None:
        raise ConflictError(
            f"{name} is being fetched by another rbee", code="model_busy", hint="rbee-keeper ps"
        )
    try:
        yield
    finally:
        unlock(path, fd)


@asynccontextmanager
async def open_staging(models: Path, name: str) -> AsyncGenerator[Path, None]:
    """Make a fresh directory on the file system of ``models``; with the body it is gone.

    The caller holds the lock of ``name``: what a killed predecessor left is removed as well.
    """
    area = models / ".staging"
    with writing(models):
        await trio.to_thread.run_sync(_remove_all, area, name)
        staging = area / f"{name}.{secrets.token_hex(4)}"
        staging.mkdir(parents=True, mode=0o700)
    try:
        yield staging
    finally:
        # removing gigabytes takes a moment, and must happen on cancellation above all
        with trio.move_on_after(CLEANUP, shield=True):
            await trio.to_thread.run_sync(discard, staging, abandon_on_cancel=True)


def open_partial(models: Path, name: str, reference: str) -> Path:
    """Make or find the directory of what has come of a download so far; it outlives the process.

    The caller holds the lock of ``name``, and calls `discard_partial` when all of it is in place.
    """
    partial = models / PARTIAL / name
    with writing(models):
        partial.mkdir(parents=True, exist_ok=True, mode=0o700)
        _note_of(models, name).write_text(reference)
    return partial


def discard_partial(models: Path, name: str) -> None:
    discard(models / PARTIAL / name)
    _note_of(models, name).unlink(missing_ok=True)


def partial_references(models: Path) -> dict[str, str]:
    """Return what the unfinished downloads are of, by name."""
    found = {}
    for path in sorted((models / PARTIAL).glob("*.reference")):
        with suppress(FileNotFoundError):  # it is finished just now
            found[path.stem] = path.read_text()
    return {name: of for name, of in found.items() if (models / PARTIAL / name).is_dir()}


def _note_of(models: Path, name: str) -> Path:
    return models / PARTIAL / f"{name}.reference"


def link(source: Path, target: Path) -> None:
    """Give a file a second name, so that the first one stays until the second is in its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without hard links
        source.rename(target)


async def publish(staged: Path, target: Path) -> None:
    """Put a finished directory in its place; an unusable older one makes room.

    Raises:
        ConflictError: a worker has the older one.
    """
    with writing(target.parent):
        await trio.to_thread.run_sync(_sync_files, staged)
        _swap_in(staged, target)


def discard(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):
        directory.parent.rmdir()  # the staging area, when nobody else uses it


def _swap_in(staged: Path, target: Path) -> None:
    if not target.exists():
        staged.rename(target)
        return
    with unused(target.parent, target.name):
        target.rename(staged.with_name(f"old-{secrets.token_hex(4)}"))
        staged.rename(target)


def _sync_files(directory: Path) -> None:
    """A power loss after the rename must not leave whole names on empty files."""
    for path in (*(entry for entry in directory.rglob("*") if entry.is_file()), directory):
        trio.from_thread.check_cancelled()
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove_all(area: Path, name: str) -> None:
    for left in area.glob(f"{name}.{'[0-9a-f]' * 8}"):  # not those of NAME.5
        shutil.rmtree(left, ignore_errors=True)
