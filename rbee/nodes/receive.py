"""Runs on a node while a model is copied there: standard library only, sent through SSH.

``prepare`` says what of the model is there and holds its lock until it is ended, ``room`` whether
there is room for the rest; ``finish`` checks what has come and puts it in its place. What lies
where is as in `rbee.models.catalog`, `staging` and `locks`: an unfinished copy is an unfinished
download to the rbee of the node.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class Place:
    """Where a model belongs in the catalog of a home."""

    def __init__(self, home: str, name: str, record: str) -> None:
        root = Path(home or os.environ.get("RBEE_HOME") or "~/.rbee").expanduser().absolute()
        self.models, self.name, self.record = root / "models", name, record
        self.directory = self.models / name
        self.record_file = self.models / f"{name}.json"
        self.partial = self.models / ".partial" / name
        self.note = self.models / ".partial" / f"{name}.reference"
        self.entry = json.loads(record)
        self.parts = {part_of(file): file for file in self.entry["files"]}

    def is_there(self) -> bool:
        """Tell whether the node has the same files, whole."""
        try:
            found = json.loads(self.record_file.read_bytes())["files"]
            sizes = [(self.directory / file["name"]).stat().st_size for file in found]
        except (OSError, ValueError, LookupError, TypeError):
            return False
        hashes = {file["name"]: file["sha256"] for file in self.entry["files"]}
        return sizes == [file["size"] for file in found] and hashes == {
            # some records have no hashes: then the sizes have to do
            file["name"]: file["sha256"] or hashes.get(file["name"])
            for file in found
        }

    def have(self) -> dict[str, int]:
        """Return the bytes of each part that came before."""
        found = {}
        for part, file in self.parts.items():
            path = self.partial / part
            if path.is_file() and path.stat().st_size <= file["size"]:
                found[part] = path.stat().st_size
        return found


def part_of(file: Any) -> str:
    return f"{file['sha256'][:16]}-{file['name'].replace('/', '--')}"


def say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock as `rbee.models.locks` does; False if somebody else has it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.path.samestat(os.fstat(fd), path.stat())
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    try:
        yield is_ours
    finally:
        if is_ours:
            path.unlink(missing_ok=True)
        os.close(fd)


# before ---------------------------------------------------------------------------------------
def prepare(place: Place) -> None:
    place.models.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(place.models / ".locks" / place.name) as is_ours:
        if not is_ours:
            say(state="busy")
        elif place.is_there():
            say(state="there", directory=str(place.directory))
        elif is_used(place):
            say(state="used")
        else:
            expect(place)


def is_used(place: Place) -> bool:
    with locked(place.models / ".in-use" / place.name) as is_ours:
        return not is_ours


def expect(place: Place) -> None:
    have = place.have()
    if not has_room(place):
        return
    place.partial.mkdir(mode=0o700, parents=True, exist_ok=True)
    place.note.write_text(place.entry["reference"])
    for path in place.partial.iterdir():
        if path.name not in have:
            path.unlink()
    say(state="ready", have=have, partial=str(place.partial))
    signal.pause()


def has_room(place: Place) -> bool:
    """Tell whether the disk has room for what has not come yet; if not, say so."""
    came = sum(place.have().values())
    needed: int = sum(file["size"] for file in place.parts.values()) - came
    free = free_bytes(place.models)
    if needed > free:
        say(state="full", needed=needed, free=free, models=str(place.models))
    return needed <= free


def room(place: Place) -> None:
    if has_room(place):
        say(state="room")


def free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


# after ----------------------------------------------------------------------------------------
def finish(place: Place) -> None:
    wrong = [part for part, file in place.parts.items() if not is_whole(place.partial / part, file)]
    if wrong:
        for part in wrong:
            (place.partial / part).unlink(missing_ok=True)
        say(state="wrong", wrong=wrong)
        return
    area = place.models / ".staging"
    remove_all(area, place.name)
    staging = area / f"{place.name}.{secrets.token_hex(4)}"
    staging.mkdir(mode=0o700, parents=True)
    try:
        publish(place, assemble(place, staging / "model"), staging)
    finally:
        discard(staging)


def is_whole(path: Path, file: Any) -> bool:
    try:
        if path.stat().st_size != file["size"]:
            return False
        with path.open("rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
    except FileNotFoundError:
        return False
    return bool(found == file["sha256"])


def assemble(place: Place, staged: Path) -> Path:
    """Give each part its own name; the parts stay until the model is in its place."""
    staged.mkdir()
    for part, file in place.parts.items():
        target = staged / file["name"]
        target.parent.mkdir(exist_ok=True)
        try:
            target.hardlink_to(place.partial / part)
        except OSError:  # a file system without hard links
            (place.partial / part).rename(target)
        sync(target)
    sync(staged)
    return staged


def publish(place: Place, staged: Path, staging: Path) -> None:
    with locked(place.models / ".in-use" / place.name) as is_ours:
        if not is_ours:
            say(state="used")
            return
        if place.directory.exists():
            place.directory.rename(staging / "old")
        staged.rename(place.directory)
        write_record(place)
    place.note.unlink(missing_ok=True)
    discard(place.partial)
    say(state="there", directory=str(place.directory))


def write_record(place: Place) -> None:
    temporary = place.models / f".{place.record_file.name}.{secrets.token_hex(4)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(place.record)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(place.record_file)
    sync(place.models)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_all(area: Path, name: str) -> None:
    for left in area.glob(f"{name}.{'[0-9a-f]' * 8}"):
        shutil.rmtree(left, ignore_errors=True)


def discard(directory: Path) -> None:
    """Remove a directory, and the one around it if nobody else uses that."""
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):
        directory.parent.rmdir()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    verb, home, name, record = sys.argv[1:]
    try:
        {"prepare": prepare, "room": room, "finish": finish}[verb](Place(home, name, record))
    except OSError as exc:
        say(state="failed", why=f"{exc.filename or home}: {exc.strerror}")


if __name__ == "__main__":
    main()
