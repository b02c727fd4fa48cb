"""``ps``, ``status`` and ``worker list``: what runs, told with or without a queen."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractAsyncContextManager
from typing import Any

import attrs

from rbee import __version__
from rbee.config import load_config
from rbee.home import Home, find_home
from rbee.keeper.flags import QueenFlags
from rbee.keeper.operator import queen_facts
from rbee.keeper.output import human_bytes, note, print_facts, print_rows
from rbee.keeper.queen import QueenAccess, open_running_queen
from rbee.model import LOCALHOST
from rbee.remains import LEFT, PROCESSES, in_short
from rbee.wire.messages import HiveInfo, WorkerInfo

NO_QUEEN = "no queen running"
WORKER_COLUMNS = (
    "worker_id", "node", "state", "model", "engine", "backend", "device", "running", "idle",
    "keep_alive", "pid", "url",
)  # fmt: skip


async def list_workers(flags: QueenFlags) -> None:
    """Print the workers of the queen's nodes."""
    async with open_queen(flags) as queen:
        if queen is None:
            note(NO_QUEEN)
        workers = await queen.client.workers() if queen else []
        if queen and not workers:
            note("no workers yet; the first answer starts one")
    rows = [_worker_facts(w) if flags.json else _worker_row(w) for w in workers]
    print_rows(WORKER_COLUMNS, rows, as_json=flags.json)


async def list_processes(flags: QueenFlags) -> None:
    """Print queen, hives and workers, one line each."""
    home = find_home(flags.home)
    async with open_queen(flags) as queen:
        if queen is None:
            note(NO_QUEEN)
            alone = operators_hive(home)
            rows = [_hive_row(alone)] if alone else []
        else:
            rows = await _rows(queen)
    columns = ("component", "node", "pid", "state", "owner", "model", "url")
    print_rows(columns, rows, as_json=flags.json)


async def show_status(flags: QueenFlags) -> None:
    """Print how this home stands."""
    home = find_home(flags.home)
    facts: dict[str, Any] = {"version": __version__, "home": str(home.root)}
    async with open_queen(flags) as queen:
        if queen is None:
            note(NO_QUEEN)
        told = queen_facts(queen)
        hives = await queen.client.hives() if queen else []
        workers = await queen.client.workers() if queen else []
    facts["queen"] = told if flags.json else _in_words(told)
    facts["hives"] = len(hives) if flags.json else _hives_in_words(hives)
    facts["workers"] = len(workers) if flags.json else _workers_in_words(workers)
    facts["ready"] = sum(worker.state == "ready" for worker in workers)
    left = [worker for worker in workers if worker.state in LEFT]
    facts["left"] = [_left_facts(one) for one in left] if flags.json else _left_in_words(left)
    facts["running"] = sum(worker.running for worker in workers)
    facts["aliases"] = len(load_config(home.config_file).aliases)
    if flags.json:
        facts["nodes"] = [attrs.asdict(hive) for hive in hives]
    print_facts(facts, as_json=flags.json)


def _hives_in_words(hives: list[HiveInfo]) -> str:
    return ", ".join([str(len(hives)), *map(_hive_in_words, hives)])


def _hive_in_words(hive: HiveInfo) -> str:
    if hive.left:
        return f"{hive.node} {hive.state} ({hive.left})"
    room = f"{human_bytes(hive.memory_free)} of memory free" if hive.memory_total else "no news yet"
    return f"{hive.node} {hive.state} ({room})"


def _workers_in_words(workers: list[WorkerInfo]) -> str:
    states = Counter(worker.state for worker in workers)
    return ", ".join([str(len(workers)), *(f"{n} {state}" for state, n in states.items())])


def _left_in_words(left: list[WorkerInfo]) -> str:
    return "\n".join(
        f"{one.worker_id} on {one.node} is {one.state}: {_message(one)}" for one in left
    )


def _left_facts(worker: WorkerInfo) -> dict[str, Any]:
    names = ("worker_id", "node", "state", "error", "processes")
    facts = _worker_facts(worker)
    return {name: facts[name] for name in names}


async def show_queen(flags: QueenFlags) -> None:
    """Print who the queen is."""
    async with open_queen(flags) as queen:
        if queen is None:
            note(NO_QUEEN)
        print_facts(queen_facts(queen), as_json=flags.json)


def open_queen(
    flags: QueenFlags, *, any_version: bool = True
) -> AbstractAsyncContextManager[QueenAccess | None]:
    """Open the queen that a command's flags mean, None if none runs."""
    return open_running_queen(
        find_home(flags.home),
        url=flags.queen_url or "",
        token_file=flags.token_file or "",
        any_version=any_version,
    )


def _in_words(told: dict[str, Any]) -> str:
    if "pid" not in told:
        return str(told["state"])
    return f"{told['state']} at {told['url']} (pid {told['pid']}, owner {told['owner']})"


async def _rows(queen: QueenAccess) -> list[dict[str, Any]]:
    health = queen.health
    rows = [_row("queen", health.id, LOCALHOST, health.pid, health.state, health.owner, queen.url)]
    rows += [_hive_row(hive) for hive in await queen.client.hives()]
    rows += [
        _row("worker", w.worker_id, w.node, w.pid, w.state, w.owner, w.url) | {"model": w.model}
        for w in await queen.client.workers()
    ]
    return rows


def _hive_row(hive: HiveInfo) -> dict[str, Any]:
    return _row("hive", hive.hive_id, hive.node, hive.pid, hive.state, hive.owner, hive.url)


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


def operators_hive(home: Home) -> HiveInfo | None:
    """Return the hive that an operator runs here: it needs no queen."""
    if not home.hive_file.exists():
        return None
    from rbee.daemon import read_run_file

    found = read_run_file(home.hive_file)
    if found is None:
        return None
    return HiveInfo(LOCALHOST, found.id, found.url, "ready", found.owner, found.pid, found.version)


def _worker_facts(worker: WorkerInfo) -> dict[str, Any]:
    """Return all that is known of a worker; ``processes``: what of it does not end."""
    error = worker.error
    processes = error.details.get(PROCESSES, []) if error else []
    return attrs.asdict(worker) | {"error": _message(worker) or None, "processes": processes}


def _message(worker: WorkerInfo) -> str:
    return worker.error.message if worker.error else ""


def state_in_words(worker: WorkerInfo) -> str:
    """Return a worker's state, with what it is at while it loads, or what of it does not end."""
    if worker.state in LEFT and worker.error:
        return f"{worker.state} ({in_short(worker.error.details) or worker.error.message})"
    if not worker.progress:
        return worker.state
    share = "" if worker.share is None else f" {int(worker.share * 100)} %"
    return f"{worker.state} ({worker.progress}{share})"


def _worker_row(worker: WorkerInfo) -> dict[str, Any]:
    """Write times for people; what a worker that cannot be used was at is not told."""
    row = {name: getattr(worker, name, None) for name in WORKER_COLUMNS}
    for_ever = worker.keep_alive < 0
    row["state"] = state_in_words(worker)
    row["keep_alive"] = "for ever" if for_ever else f"{worker.keep_alive:.0f} s"
    row["idle"] = f"{worker.idle:.0f} s" if worker.state == "ready" else None
    return row
