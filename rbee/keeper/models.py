"""``model list|show|pull|rm``: what is on this machine's disk; no queen is needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rbee.config import load_config
from rbee.home import find_home, open_home
from rbee.keeper.flags import DataFlags
from rbee.keeper.output import (
    human_bytes,
    note,
    open_output,
    print_data,
    print_facts,
    print_json,
    print_rows,
)
from rbee.keeper.queen import open_running_queen
from rbee.models.catalog import Item, list_models, remove_model, show_model


def print_models(flags: DataFlags) -> None:
    """``model list``."""
    rows = [_row(item) for item in list_models(find_home(flags.home))]
    columns = ("model", "size", "dtype", "context", "damage")
    if not rows:
        note("no models here yet; to fetch one: rbee-keeper model pull smollm2-135m")
    if not flags.json:
        rows = [row | {"size": human_bytes(row["size"])} for row in rows]
    print_rows(columns, rows, as_json=flags.json)


def print_model(flags: DataFlags, name: str) -> None:
    """``model show``."""
    home = find_home(flags.home)
    items = show_model(home, name, aliases=load_config(home.config_file).aliases)
    if flags.json:
        print_json([_details(item) for item in items])
        return
    for item in items:
        facts = _details(item)
        facts["files"] = ", ".join(facts["files"])
        print_facts(facts | {"size": human_bytes(facts["size"])}, as_json=False)


async def pull_model(flags: DataFlags, name: str) -> None:
    """``model pull``: stdout gets the directory."""
    from rbee.hive.models import default_dtype
    from rbee.models.provision import provision

    home = open_home(flags.home)
    async with open_output() as output:
        model = await provision(
            name,
            home,
            aliases=load_config(home.config_file).aliases,
            dtype=default_dtype("cpu"),
            run=_run,
            narrate=partial(output.step, "model"),
        )
    if flags.json:
        print_json({"model": model.reference, "directory": str(model.directory)})
    else:
        print_data(str(model.directory))


async def _run(argv: Sequence[str], *, log: Path) -> int:
    from rbee.process import run_program

    return await run_program(argv, log_file=log)


async def drop_model(flags: DataFlags, name: str) -> None:
    """``model rm``."""
    home = find_home(flags.home)
    async with open_running_queen(home, any_version=True) as queen:
        workers = await queen.client.workers() if queen else []
    served = {name for worker in workers for name in (worker.model, *worker.served_names)}
    removed = remove_model(home, name, served, aliases=load_config(home.config_file).aliases)
    if flags.json:
        print_json([_row(item) for item in removed])
    for item in removed:
        note(f"removed {item.entry.reference if item.entry else item.name}")


def _row(item: Item) -> dict[str, Any]:
    entry = item.entry
    return {
        "model": entry.reference if entry else item.name,
        "size": entry.size if entry else 0,
        "dtype": entry.dtype if entry else "",
        "context": entry.context if entry else 0,
        "damage": item.damage,
    }


def _details(item: Item) -> dict[str, Any]:
    facts = _row(item) | {"directory": str(item.directory), "files": []}
    if entry := item.entry:
        facts |= {
            "files": [file.name for file in entry.files],
            "source": entry.source,
            "version": entry.version,
            "architecture": entry.architecture,
            "parameters": entry.parameters,
            "chat_template": entry.has_chat_template,
        }
    return facts
