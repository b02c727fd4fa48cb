"""The catalog as it is told: every record with what is wrong with it and whether it is used."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from rbee.errors import RbeeError
from rbee.home import Home
from rbee.model import LOCALHOST
from rbee.models.catalog import GGUF, Item, list_models, not_here, wanted_names
from rbee.models.inspect import inspect_model
from rbee.models.reference import Aliases
from rbee.models.use import is_used
from rbee.wire.messages import ModelInfo

_MAGIC = b"GGUF"


def model_infos(home: Home, node: str = LOCALHOST) -> list[ModelInfo]:
    """Describe all models on this machine's disk; reads each model's head."""
    return [info_of(item, node) for item in list_models(home)]


def info_of(item: Item, node: str = LOCALHOST) -> ModelInfo:
    used = is_used(item.directory.parent, item.name)
    entry = item.entry
    if entry is None:
        reference = _lost_reference(item)
        return ModelInfo(
            reference, item.name, node, str(item.directory), size=_disk_use(item.directory),
            last_used=_record_time(item), in_use=used, damage=item.damage, references=(reference,),
        )  # fmt: skip
    return ModelInfo(
        model=entry.reference,
        name=item.name,
        node=node,
        directory=str(item.directory),
        source=entry.source,
        version=entry.version,
        size=entry.size,
        dtype=entry.dtype,
        architecture=entry.architecture,
        parameters=entry.parameters,
        context=entry.context,
        chat_template=entry.has_chat_template,
        created=entry.created,
        last_used=entry.last_used,
        in_use=used,
        files=tuple(file.name for file in entry.files),
        damage=damage_of(item),
        references=tuple(sorted(entry.references)),
    )


def matching(
    infos: Iterable[ModelInfo], name: str, *, aliases: Aliases | None, where: str
) -> list[ModelInfo]:
    """Return the models that ``name`` stands for: a reference, an alias, a record; never none.

    Raises:
        NotFoundError: it is not among ``infos``, which are those of ``where``.
    """
    infos = list(infos)
    if exact := [info for info in infos if info.name == name]:
        return exact
    wanted = wanted_names(name, aliases)
    found = [info for info in infos if not wanted.isdisjoint({info.name, *info.references})]
    if not found:
        raise not_here(name, where)
    return found


def damage_of(item: Item) -> str:
    """Look into the files as well: a head that was overwritten has still the right size."""
    if item.damage or item.entry is None:
        return item.damage
    try:
        if item.entry.dtype == GGUF:
            return _gguf_damage(item.directory / item.entry.files[0].name)
        inspect_model(item.directory)
    except RbeeError as exc:
        return exc.message
    except OSError as exc:
        return f"{item.directory} cannot be read: {exc.strerror}"
    return ""


def _gguf_damage(path: Path) -> str:
    with path.open("rb") as file:
        return "" if file.read(4) == _MAGIC else f"{path} is corrupt: it is no GGUF file"


def _lost_reference(item: Item) -> str:
    """Say what a record that cannot be read was about, as far as it still shows."""
    try:
        told = json.loads(item.directory.with_name(f"{item.name}.json").read_bytes())["reference"]
        if isinstance(told, str) and told:
            return told
    except (OSError, ValueError, LookupError, TypeError):
        pass
    kind, _, rest = item.name.partition("--")
    return f"pypi:{rest.replace('--', '==')}" if kind == "pypi" and rest else item.name


def _record_time(item: Item) -> float:
    try:
        return item.directory.with_name(f"{item.name}.json").stat().st_mtime
    except OSError:
        return 0.0


def _disk_use(directory: Path) -> int:
    try:
        return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    except OSError:
        return 0
