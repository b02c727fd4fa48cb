"""``model aliases``: the short names there are, and what they lead to."""

from __future__ import annotations

from typing import Any

from rbee.alias import Defaults
from rbee.config import Config, load_config
from rbee.errors import BadInputError
from rbee.home import find_home
from rbee.keeper.flags import DataFlags
from rbee.keeper.output import print_rows
from rbee.models.reference import BUILT_IN, spread

COLUMNS = ("alias", "sources", "from", "defaults")


def print_aliases(flags: DataFlags) -> None:
    """``model aliases``: own ones first; one that hides a built-in one is shown in its place."""
    rows = alias_rows(load_config(find_home(flags.home).config_file))
    print_rows(COLUMNS, rows if flags.json else [_shown(row) for row in rows], as_json=flags.json)


def alias_rows(config: Config) -> list[dict[str, Any]]:
    """Describe every alias; ``error`` says why one leads nowhere."""
    known = {**config.aliases, **{k: v for k, v in BUILT_IN.items() if k not in config.aliases}}
    return [_row(alias, known, config) for alias in known]


def _row(alias: str, known: dict[str, tuple[str, ...]], config: Config) -> dict[str, Any]:
    error, sources = "", known[alias]
    try:
        sources = spread(alias, known)
    except BadInputError as exc:
        error = exc.message
    return {
        "alias": alias,
        "sources": list(sources),
        "from": config.source if alias in config.aliases else "built in",
        "defaults": config.defaults.get(alias, Defaults()).said(),
        "error": error,
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    sources = f"error: {row['error']}" if row["error"] else ", ".join(row["sources"])
    return row | {"sources": sources, "defaults": ", ".join(row["defaults"])}
