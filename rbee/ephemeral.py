"""A home for one cluster only: made for it, removed with it.

Models are the exception: they stay in the user's own home, so that no cluster fetches what another
has fetched already. Whatever a program that was killed has left is removed by the next one.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rbee import guard
from rbee.home import Home, find_home, open_home, writing
from rbee.sweep import Identity, Journal, abandoned

PREFIX = "rbee-home-"
OWNER = "owner"
UNFINISHED = 60.0  # seconds that making one may take
CONFIG = "[hive]\nworker_port = 0\n"


_made: list[Path] = []


def made() -> list[Path]:
    """Return every home that this process, or the one that it was forked off, has made so far."""
    return list(_made)


@contextmanager
def open_ephemeral_home() -> Iterator[Home]:
    """Make a home while the body runs, in the directory for temporary files.

    Raises:
        MachineError: it cannot be written.
    """
    remove_abandoned()
    with writing(Path(tempfile.gettempdir())):
        root = Path(tempfile.mkdtemp(prefix=PREFIX))
    _made.append(root)
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
    """Remove a home; one whose journal names what lives stays, for who looks next."""
    run = find_home(root).run
    journal = Journal(run)
    for one in journal.living():
        one.signal(signal.SIGKILL)
    if journal.living() | journal.hidden():
        return
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)


def remove_abandoned() -> None:
    """Remove the homes of this user whose program is gone, once nothing runs there any more."""
    for root in _homes():
        if _is_abandoned(root):
            _remove(root)


def remove_own(among: Collection[Path]) -> list[Path]:
    """Remove those of these homes that this process has made; return which were left."""
    left = [root for root in _homes() if root in among]
    own = [root for root in left if (owner := _owner(root)) and owner.pid == os.getpid()]
    for root in own:
        _remove(root)
    return own


def _homes() -> list[Path]:
    found = []
    for root in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else has removed it
            if root.lstat().st_uid == os.getuid():
                found.append(root)
    return found


def _owner(root: Path) -> Identity | None:
    """Return the process of this boot that made a home."""
    try:
        boot, pid, start = (root / OWNER).read_text().split()
        return Identity(int(pid), int(start)) if boot == guard.boot_id() else None
    except (OSError, ValueError):
        return None


def _is_abandoned(root: Path) -> bool:
    owner = _owner(root)
    if owner is None:
        return _is_old(root) and abandoned(find_home(root).run)
    return not owner.alive() and abandoned(find_home(root).run)


def _is_old(root: Path) -> bool:
    try:
        return time.time() - root.lstat().st_mtime > UNFINISHED
    except OSError:
        return False
