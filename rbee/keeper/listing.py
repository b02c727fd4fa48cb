"""``ps``, ``status`` and ``worker list``: what runs, told with or without a queen."""

from __future__ import annotations

from typing import Any

from rbee import __version__
from rbee.config import load_config
from rbee.home import Home, find_home
from rbee.keeper.flags import QueenFlags
from rbee.keeper.operator import queen_facts
from rbee.keeper.output import note, print_facts, print_rows
from rbee.keeper.queen import QueenAccess, open_running_queen
from rbee.model import LOCALHOST
from rbee.wire.messages import WorkerInfo

NO_QUEEN = "no queen running"


async def list_workers(flags: QueenFlags) -> None:
    """Print the workers of the queen's nodes."""
    async with _open_queen(flags) as queen:
        if queen is None:
            note(NO_QUEEN)
        workers = await queen.client.workers() if queen else []
        if queen and not workers:
            note("no workers yet; the first answer starts one")
    columns = ("worker_id", "node", "state", "model", "engine", "backend", "device", "pid", "url")
    rows = [_worker_row(worker) for worker in workers]
    if not flags.json:
        for row, worker in zip(rows, workers, strict=True):
            row["state"] = state_in_words(worker)
    print_rows(columns, rows, as_json=flags.json)


async def list_processes(flags: QueenFlags) -> None:
    """Print queen, hives and workers, one line each."""
    home = find_home(flags.home)
    async with _open_queen(flags) as queen:
        if queen is None:
            note(NO_QUEEN)
            rows = _operator_hive(home)
        else:
            rows = await _rows(queen)
    columns = ("component", "node", "pid", "state", "owner", "model", "url")
    print_rows(columns, rows, as_json=flags.json)


async def show_status(flags: QueenFlags) -> None:
    """Print how this home stands."""
    home = find_home(flags.home)
    facts: dict[str, Any] = {"version": __version__, "home": str(home.root)}
    async with _open_queen(flags) as queen:
        if queen is None:
            note(NO_QUEEN)
        told = queen_facts(queen)
        facts["queen"] = told if flags.json else _in_words(told)
        facts["hives"] = len(await queen.client.hives()) if queen else 0
        workers = await queen.client.workers() if queen else []
    facts["workers"] = len(workers)
    facts["ready"] = sum(worker.state == "ready" for worker in workers)
    facts["aliases"] = len(load_config(home.config_file).aliases)
    print_facts(facts, as_json=flags.json)


async def show_queen(flags: QueenFlags) -> None:
    """Print who the queen is."""
    async with _open_queen(flags) as queen:
        if queen is None:
            note(NO_QUEEN)
        print_facts(queen_facts(queen), as_json=flags.json)


def _open_queen(flags: QueenFlags) -> Any:
    return open_running_queen(
        find_home(flags.home),
        url=flags.queen_url or "",
        token_file=flags.token_file or "",
        any_version=True,
    )


def _in_words(told: dict[str, Any]) -> str:
    if "pid" not in told:
        return str(told["state"])
    return f"{told['state']} at {told['url']} (pid {told['pid']}, owner {told['owner']})"


async def _rows(queen: QueenAccess) -> list[dict[str, Any]]:
    health = queen.health
    rows = [_row("queen", health.id, LOCALHOST, health.pid, health.state, health.owner, queen.url)]
    rows += [
        _row("hive", hive.hive_id, hive.node, hive.pid, hive.state, hive.owner, hive.url)
        for hive in await queen.client.hives()
    ]
    rows += [
        _row("worker", w.worker_id, w.node, w.pid, w.state, w.owner, w.url) | {"model": w.model}
        for w in await queen.client.workers()
    ]
    return rows


def _row(
    component: str, identity: str, node: str, pid: int, state: str, owner: str, url: str
) -> dict[str, Any]:
    return {
        "component": component,
        "id": identity,
        "node": node,
        "pid": pid,
        "state": state,
        "owner": owner,
        "model": "",
        "url": url,
    }


def _operator_hive(home: Home) -> list[dict[str, Any]]:
    """Return the hive that an operator runs here: it needs no queen."""
    if not home.hive_file.exists():
        return []
    from rbee.daemon import read_run_file

    record = read_run_file(home.hive_file)
    if record is None:
        return []
    return [
        _row("hive", record.id, LOCALHOST, record.pid, "ready", record.owner, record.url),
    ]


def state_in_words(worker: WorkerInfo) -> str:
    """Return a worker's state, with what it is at while it loads."""
    if not worker.progress:
        return worker.state
    share = "" if worker.share is None else f" {int(worker.share * 100)} %"
    return f"{worker.state} ({worker.progress}{share})"


def _worker_row(worker: WorkerInfo) -> dict[str, Any]:
    names = ("worker_id", "node", "state", "model", "engine", "backend", "device", "pid", "url")
    row = {name: getattr(worker, name) for name in (*names, "owner", "served_names")}
    row |= {"progress": worker.progress, "share": worker.share}
    row["error"] = worker.error.message if worker.error else None
    return row
