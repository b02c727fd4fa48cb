"""A home for one cluster only: made for it, removed with it.

Models are the exception: they stay in the user's own home, so that no cluster fetches what another
has fetched already. Whatever a program that was killed has left is removed by the next one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rbee import guard
from rbee.home import Home, find_home, open_home, writing
from rbee.sweep import Identity, abandoned

PREFIX = "rbee-home-"
OWNER = "owner"
UNFINISHED = 60.0  # seconds that making one may take
CONFIG = "[hive]\nworker_port = 0\n"


@contextmanager
def open_ephemeral_home() -> Iterator[Home]:
    """Make a home while the body runs, in the directory for temporary files.

    Raises:
        MachineError: it cannot be written.
    """
    remove_abandoned()
    with writing(Path(tempfile.gettempdir())):
        root = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        pid = os.getpid()
        with writing(root):
            (root / OWNER).write_text(f"{guard.boot_id()} {pid} {guard.start_time(pid)}\n")
            (root / "config.toml").write_text(CONFIG)
        _share_models(root)
        yield open_home(root)
    finally:
        _remove(root)


def _share_models(root: Path) -> None:
    """Use the models of the user's home; one that cannot be written leaves us our own."""
    models = find_home().models
    with suppress(OSError):
        models.mkdir(mode=0o700, parents=True, exist_ok=True)
        (root / "models").symlink_to(models)


def _remove(root: Path) -> None:
    shutil.rmtree(find_home(root).run, ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)


def remove_abandoned() -> None:
    """Remove the homes of this user whose program is gone, once nothing runs there any more."""
    for root in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else is removing it
            if root.lstat().st_uid == os.getuid() and _is_abandoned(root):
                _remove(root)


def _is_abandoned(root: Path) -> bool:
    try:
        boot, pid, start = (root / OWNER).read_text().split()
    except (OSError, ValueError):
        return time.time() - root.lstat().st_mtime > UNFINISHED
    if boot == guard.boot_id() and Identity(int(pid), int(start)).alive():
        return False
    return abandoned(find_home(root).run)
