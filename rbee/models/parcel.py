"""A model of this machine, made ready to be sent to another one's catalog."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import attrs
import trio

from rbee.errors import BadInputError, NotFoundError
from rbee.hints import pull
from rbee.home import Home
from rbee.models.catalog import Entry, File, Item, show_model
from rbee.models.child import Narrate
from rbee.models.info import damage_of
from rbee.models.inspect import inspect_model, weight_files
from rbee.models.progress import amount
from rbee.models.pypi import CHUNK
from rbee.models.reference import (
    Aliases,
    LocalPath,
    has_config,
    meaning_of,
    parse,
    shown,
    slug,
    typed_path,
)
from rbee.models.repository import Remote, belongs


@attrs.frozen
class Parcel:
    """One record as it is to be on the other machine, and where its files are on this one."""

    name: str
    entry: Entry
    directory: Path

    def parts(self) -> dict[str, File]:
        """Return the files by what they are called on the way, as an unfinished download's."""
        files = self.entry.files
        return {Remote(file.name, sha256=file.sha256).part: file for file in files}


def find_parcel(home: Home, name: str, *, aliases: Aliases, dtype: str | None = None) -> Parcel:
    """Find what ``name`` stands for on this machine: in the catalog, else a model directory.

    Of a GGUF and what was made of it the GGUF goes, unless ``dtype`` names one of the latter.

    Raises:
        NotFoundError: it is not here, or not in this dtype.
        BadInputError: it is damaged, or the name is none.
    """
    paths = [typed_path(text) for text in meaning_of(name, aliases).sources or (name,)]
    if items := _whole_items(home, name, aliases):
        return _of_item(_chosen(items, name, dtype), next(filter(None, paths), None))
    for path in paths:
        if path is not None and has_config(path.path):
            return _of_directory(path)
    parse(name, aliases)  # a path that is not there, a name that stands for nothing
    raise NotFoundError(
        f"{shown(name)} is not on this machine (needed: a model in its catalog, or a directory "
        "with config.json)",
        code="model_not_here",
        hint=pull(shown(name)),
    )


def _whole_items(home: Home, name: str, aliases: Aliases) -> list[Item]:
    try:
        items = show_model(home, name, aliases=aliases)
    except NotFoundError:
        return []
    damage = {item.name: damage_of(item) for item in items}
    if whole := [item for item in items if not damage[item.name]]:
        return whole
    raise _damaged(name, damage[items[0].name])


def _damaged(name: str, why: str) -> BadInputError:
    return BadInputError(
        f"{shown(name)} is damaged on this machine: {why}",
        code="corrupt_model",
        hint=pull(shown(name)),
    )


def _chosen(items: Sequence[Item], name: str, dtype: str | None) -> Item:
    made = {item.entry.dtype: item for item in items if item.entry and item.entry.origins}
    came = [item for item in items if item.entry and not item.entry.origins]
    if dtype in made:
        return made[dtype]
    if came and (dtype is None or not made):
        return came[0]
    if dtype is None:
        return max(made.values(), key=lambda item: item.entry.last_used if item.entry else 0)
    raise NotFoundError(
        f"{shown(name)} is not on this machine in {dtype}; it is in {', '.join(sorted(made))}",
        code="model_not_here",
        hint=pull(shown(name), "--dtype", dtype),
    )


def _of_item(item: Item, path: LocalPath | None) -> Parcel:
    entry = item.entry
    assert entry is not None
    if entry.source == "file":  # on the other machine there is no file that it could differ from
        entry = attrs.evolve(entry, reference=str(path or entry.reference), origins=())
    return Parcel(item.name, attrs.evolve(entry, last_used=0.0), item.directory)


def _of_directory(path: LocalPath) -> Parcel:
    found = inspect_model(path.path)
    weights = {file.name for file in weight_files(path.path)}
    files = tuple(
        File(name, (path.path / name).stat().st_size)
        for name in _names(path.path)
        if name in weights or belongs(name)
    )
    entry = Entry(
        str(path), "file", "", files, found.dtype, found.architecture, found.parameters,
        found.context, found.has_chat_template,
    )  # fmt: skip
    return Parcel(slug(path), entry, path.path)


def _names(directory: Path) -> Iterator[str]:
    """Return the files, and those one level down: the modules of an embedding model."""
    for path in sorted([*directory.iterdir(), *directory.glob("[0-9]*_*/*")]):
        if path.is_file():
            yield str(path.relative_to(directory))


# hashes -----------------------------------------------------------------------------------------
async def seal(parcel: Parcel, narrate: Narrate) -> Parcel:
    """Read all files and note their hashes, by which the other machine checks them.

    Raises:
        BadInputError: a file cannot be read, or is not what was fetched.
    """
    total, done = parcel.entry.size, 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        narrate("hash", amount(done, total), share=done / (total or 1))

    files = []
    for file in parcel.entry.files:
        hashed = partial(_hashed, parcel, file, count)
        files.append(await trio.to_thread.run_sync(hashed))
    return attrs.evolve(parcel, entry=attrs.evolve(parcel.entry, files=tuple(files)))


def _hashed(parcel: Parcel, file: File, count: Callable[[int], None]) -> File:
    digest, size, model = hashlib.sha256(), 0, parcel.entry.reference
    try:
        with (parcel.directory / file.name).open("rb") as data:
            while chunk := data.read(8 * CHUNK):
                digest.update(chunk)
                size += len(chunk)
                trio.from_thread.run_sync(count, len(chunk))  # raises where we are cancelled
    except OSError as exc:
        raise _damaged(model, f"{file.name}: {exc.strerror or exc}") from exc
    if size != file.size or file.sha256 not in ("", digest.hexdigest()):
        raise _damaged(model, f"{file.name} is not what was fetched: size or hash differ")
    return attrs.evolve(file, sha256=digest.hexdigest())
