"""``reap``: what rbee has left on this machine or a node, told and ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from rbee import leftovers
from rbee.errors import RbeeError
from rbee.home import find_home
from rbee.keeper.flags import ReapFlags
from rbee.keeper.output import human_bytes, note, print_rows
from rbee.leftovers import ENDING, FOUND, Leftover
from rbee.model import LOCALHOST, node_name

COLUMNS = ("node", "kind", "pid", "name", "state", "memory", "path", "outcome")


async def reap_leftovers(flags: ReapFlags) -> None:
    """Print what is left and end it, unless it is a dry run.

    Raises:
        RbeeError: something does not end.
    """
    name = node_name(flags.node or LOCALHOST)
    if name == LOCALHOST:
        rows, errors = await _reap_here(flags)
    else:
        from rbee.keeper.far_reap import reap_far

        rows, errors = await reap_far(flags, name)
    if not rows:
        note(f"nothing is left of rbee on {name}")
    print_rows(COLUMNS, rows if flags.json else [_shown(row) for row in rows], as_json=flags.json)
    if rows and flags.dry_run:
        note("a dry run: nothing was ended")
    for error in errors:
        raise error


async def _reap_here(flags: ReapFlags) -> tuple[list[dict[str, Any]], Sequence[RbeeError]]:
    home = find_home(flags.home)
    reaped = leftovers.find(home) if flags.dry_run else await leftovers.end(home)
    return [_row(one) for one in reaped.leftovers], reaped.errors


def _row(one: Leftover) -> dict[str, Any]:
    process = attrs.asdict(one.process) if one.process else {}
    row = {name: process.get(name) for name in ("pid", "name", "state", "memory")}
    return {"node": LOCALHOST, "kind": one.kind, **row, "path": one.path, "outcome": one.outcome}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Write sizes for people, and what would be done."""
    memory = human_bytes(row["memory"]) if isinstance(row["memory"], int | float) else None
    words = {FOUND: "would be ended", ENDING: "being ended by its guard"}
    outcome = words.get(str(row["outcome"]), row["outcome"])
    return row | {"memory": memory, "outcome": outcome}
