"""``model list|show``: what is on the disks, told with or without a queen."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from rbee.config import load_config
from rbee.errors import RbeeError, UnavailableError
from rbee.home import Home, find_home
from rbee.keeper.flags import ModelFlags
from rbee.keeper.output import human_bytes, note, print_facts, print_json, print_rows
from rbee.keeper.queen import QueenAccess, open_running_queen
from rbee.model import LOCALHOST, node_name
from rbee.models.info import matching, model_infos
from rbee.models.preflight import free_disk
from rbee.wire import codec
from rbee.wire.messages import ModelInfo

COLUMNS = ("model", "size", "dtype", "context", "template", "last_used", "in_use", "damage")
_AGES = (("day", 86400), ("hour", 3600), ("minute", 60))


async def print_models(flags: ModelFlags) -> None:
    """``model list``."""
    home = find_home(flags.home)
    infos = await find_infos(flags, home)
    if flags.json:
        print_json(codec.to_dict(infos))
    else:
        has_others = any(info.node != LOCALHOST for info in infos)
        columns = ("node", *COLUMNS) if has_others else COLUMNS
        print_rows(columns, [_row(info) for info in infos], as_json=False)
    if not infos:
        where = f" on {flags.node}" if flags.node else ""
        note(f"no models{where} yet; to fetch one: rbee-keeper model pull smollm2-135m")
        return
    _note_disk(infos, None if flags.queen_url else home)


async def print_model(flags: ModelFlags, name: str) -> None:
    """``model show``."""
    home = find_home(flags.home)
    infos = await find_infos(flags, home)
    found = find_among(infos, name, flags, home)
    if flags.json:
        print_json(codec.to_dict(found))
        return
    for info in found:
        print_facts(_facts(info), as_json=False)


async def find_infos(flags: ModelFlags, home: Home) -> list[ModelInfo]:
    """Return the models of the node asked for: as a running queen tells, else of our own disk.

    Raises:
        UnavailableError: only a queen can tell of another node, and none runs.
        NotFoundError: she knows of no such node.
    """
    try:
        async with open_queen_for(flags, home) as queen:
            if queen is not None:
                if flags.node not in (None, LOCALHOST):
                    await queen.client.start_hive(flags.node)  # who else tells of its disk?
                infos = await queen.client.models()
                return [info for info in infos if flags.node in (None, info.node)]
    except RbeeError as exc:
        if flags.queen_url or flags.node not in (None, LOCALHOST):
            raise
        note(f"{exc}; these are the models of this machine")
    return await read_disk(home)


async def read_disk(home: Home) -> list[ModelInfo]:
    return await trio.to_thread.run_sync(partial(model_infos, home), abandon_on_cancel=True)


@asynccontextmanager
async def open_queen_for(flags: ModelFlags, home: Home) -> AsyncGenerator[QueenAccess | None, None]:
    """Yield the queen to ask; None if none runs and our own disk will do."""
    if flags.node is not None:
        node_name(flags.node)
    async with open_running_queen(
        home, url=flags.queen_url or "", token_file=flags.token_file or ""
    ) as queen:
        if queen is None and flags.node not in (None, LOCALHOST):
            raise UnavailableError(
                f"no queen is running, and only a queen knows of node {flags.node}",
                code="no_queen",
                hint="rbee-keeper queen start",
            )
        yield queen


def find_among(
    infos: Sequence[ModelInfo], name: str, flags: ModelFlags, home: Home
) -> list[ModelInfo]:
    """Return the models that ``name`` stands for; raise `NotFoundError` if there are none."""
    aliases = load_config(home.config_file).aliases
    return matching(infos, name, aliases=aliases, where=flags.node or str(home.models))


def _row(info: ModelInfo) -> dict[str, Any]:
    return {
        "node": info.node,
        "model": info.model,
        "size": human_bytes(info.size),
        "dtype": info.dtype,
        "context": info.context or "",
        "template": _yes(info.chat_template),
        "last_used": ago(info.last_used),
        "in_use": _yes(info.in_use),
        "damage": info.damage,
    }


def _facts(info: ModelInfo) -> dict[str, Any]:
    facts: dict[str, Any] = codec.to_dict(info)
    if info.references in ((), (info.model,)):
        del facts["references"]
    else:
        facts["references"] = ", ".join(info.references)
    return facts | {
        "size": human_bytes(info.size),
        "parameters": info.parameters or "",
        "context": info.context or "",
        "chat_template": _yes(info.chat_template),
        "in_use": _yes(info.in_use),
        "created": _when(info.created),
        "last_used": _when(info.last_used),
        "files": ", ".join(info.files),
    }


def _note_disk(infos: Sequence[ModelInfo], home: Home | None) -> None:
    total = human_bytes(sum(info.size for info in infos))
    count = f"{len(infos)} model{'s' if len(infos) > 1 else ''}"
    free = f"; {human_bytes(free_disk(home.models))} free at {home.models}" if home else ""
    note(f"{count}, {total} on disk{free}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _when(moment: float) -> str:
    if not moment:
        return ""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(moment))} ({ago(moment)})"


def ago(moment: float, now: float | None = None) -> str:
    """Say for people how long ago something was: ``3 days ago``."""
    if not moment:
        return "never"
    seconds = (time.time() if now is None else now) - moment
    for name, length in _AGES:
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"
