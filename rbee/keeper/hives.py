"""``hive start|stop|status|list``: the hives of a queen."""

from __future__ import annotations

from typing import Any

import attrs
import trio

from rbee.client import OPERATOR
from rbee.errors import ConflictError, NotFoundError
from rbee.home import find_home
from rbee.keeper.flags import NodeFlags
from rbee.keeper.listing import NO_QUEEN, open_queen, operators_hive
from rbee.keeper.output import (
    human_bytes,
    note,
    open_output,
    print_data,
    print_facts,
    print_json,
    print_rows,
)
from rbee.keeper.workers import needed
from rbee.model import LOCALHOST, node_name
from rbee.wire.messages import HiveInfo, Narration

COLUMNS = (
    "node", "state", "workers", "last_seen", "memory_free", "disk_free", "pid", "owner", "url",
)  # fmt: skip


async def start_hive(flags: NodeFlags) -> None:
    """``hive start``: its URL on stdout; the queen starts it, or uses the one that runs."""
    node = node_name(flags.node or LOCALHOST)
    async with open_queen(flags, any_version=False) as found, open_output() as output:
        queen = needed(found, "a hive")

        async def tell(told: Narration) -> None:
            await output.narrate(told.actor, told.action, told.text, told.share)

        before = {hive.hive_id for hive in await queen.client.hives()}
        hive = await queen.client.start_hive(node, tell)
    if hive.hive_id in before or hive.owner == OPERATOR:
        note(f"a hive runs already on {node} (pid {hive.pid}, owner {hive.owner})")
    if flags.json:
        print_json(attrs.asdict(hive))
    else:
        print_data(hive.url)


async def stop_hive(flags: NodeFlags) -> None:
    """``hive stop``: the seconds on stdout; what does not run is fine."""
    node = node_name(flags.node or LOCALHOST)
    begin, stopped = trio.current_time(), False
    async with open_queen(flags) as queen:
        if queen is None:
            _refuse_operators(flags)
            note(NO_QUEEN)
        else:
            stopped = any(hive.node == node for hive in await queen.client.hives())
            await queen.client.stop_hive(node)
    if queen and not stopped:
        note(f"no hive runs on {node}")
    seconds = round(trio.current_time() - begin, 2) if stopped else 0.0
    if flags.json:
        print_json({"node": node, "stopped": stopped, "seconds": seconds})
    elif stopped:
        print_data(f"stopped in {seconds:.2f} s")


def _refuse_operators(flags: NodeFlags) -> None:
    hive = operators_hive(find_home(flags.home))
    if hive is not None and (flags.node or LOCALHOST) == LOCALHOST:
        raise ConflictError(
            f"the hive on {LOCALHOST} (pid {hive.pid}) was started by an operator: "
            "nobody else ends it",
            code="not_owned",
            hint=f"kill {hive.pid}",
        )


async def list_hives(flags: NodeFlags) -> None:
    """``hive list``: one line each."""
    hives = await _hives(flags)
    rows = [attrs.asdict(hive) if flags.json else _shown(hive) for hive in hives]
    print_rows(COLUMNS, rows, as_json=flags.json)


async def show_hive(flags: NodeFlags) -> None:
    """``hive status``: all about a node's hive."""
    node = node_name(flags.node or LOCALHOST)
    hive = next((hive for hive in await _hives(flags) if hive.node == node), None)
    if hive is None:
        print_facts({"node": node, "state": "not running"}, as_json=flags.json)
    elif flags.json:
        print_facts(attrs.asdict(hive), as_json=True)
    else:
        names = [field.name for field in attrs.fields(HiveInfo)]
        shown = _shown(hive)
        print_facts({name: shown[name] for name in names}, as_json=False)


async def _hives(flags: NodeFlags) -> list[HiveInfo]:
    async with open_queen(flags) as queen:
        if queen is None:
            note(NO_QUEEN)
            alone = operators_hive(find_home(flags.home))
            hives = [alone] if alone else []
        else:
            hives = await queen.client.hives()
            _check_node(flags.node, {known.name for known in await queen.client.nodes()})
    return [hive for hive in hives if flags.node in (None, hive.node)]


def _check_node(node: str | None, known: set[str]) -> None:
    if node is not None and node not in known:
        raise NotFoundError(
            f"no node {node!r}; known: {', '.join(sorted(known))}",
            code="unknown_node",
            hint="rbee-keeper hive list",
        )


def _shown(hive: HiveInfo) -> dict[str, Any]:
    """Write times and sizes for people."""
    facts = attrs.asdict(hive)
    facts["last_seen"] = f"{hive.last_seen:.0f} s ago" if hive.memory_total else None
    for name in ("memory_total", "memory_free", "disk_free"):
        facts[name] = human_bytes(facts[name]) if facts[name] else None
    return facts
