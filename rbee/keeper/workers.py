"""``worker start|stop``: workers that somebody wants by name, not by a question."""

from __future__ import annotations

from typing import Any

import attrs
import trio

from rbee.client import OPERATOR, AsyncClient
from rbee.config import load_config
from rbee.errors import NotFoundError, RbeeError, UnavailableError, UsageError
from rbee.home import Home, find_home
from rbee.keeper.flags import WorkerStartFlags, WorkerStopFlags
from rbee.keeper.listing import NO_QUEEN, open_queen
from rbee.keeper.output import note, open_output, print_data, print_json, print_rows
from rbee.keeper.queen import QueenAccess
from rbee.keeper.start import start_settings
from rbee.models.reference import absolute, meanings
from rbee.wire.messages import Narration, StartWorker, WorkerInfo


def start_request(flags: WorkerStartFlags, model: str) -> StartWorker:
    """Make the request of ``worker start``.

    Raises:
        BadInputError: a value that no queen would take.
    """
    settings = start_settings(flags)
    return StartWorker(model=absolute(model), **settings | {"engine": settings["engine"] or ""})


async def start_worker(flags: WorkerStartFlags, request: StartWorker) -> None:
    """``worker start``: the worker's id on stdout, when it is ready."""
    if flags.explain:
        await explain_start(flags, request)
        return
    async with open_queen(flags, any_version=False) as found, open_output() as output:
        queen = needed(found, "a worker")

        async def tell(narration: Narration) -> None:
            await output.narrate(narration.actor, narration.action, narration.text, narration.share)

        info = await queen.client.start_worker(request, tell, wait=flags.wait)
    if flags.json:
        print_json({"worker_id": info.worker_id, "state": info.state, "url": info.url})
    else:
        print_data(info.worker_id)


async def explain_start(flags: WorkerStartFlags, request: StartWorker) -> None:
    """``worker start --explain``: every node, the best first, and why."""
    async with open_queen(flags, any_version=False) as found:
        choices = await needed(found, "a worker").client.explain_start(request)
    rows = [attrs.asdict(choice) for choice in choices]
    print_rows(("node", "suits", "why"), rows, as_json=flags.json)


def needed(queen: QueenAccess | None, what: str) -> QueenAccess:
    """Return the queen that is to keep ``what``; tell if she will not for long.

    Raises:
        UnavailableError: none runs, and one of this command's own would end with it.
    """
    if queen is None:
        raise UnavailableError(
            f"{NO_QUEEN}, and {what} belongs to one: it would end with this command",
            code="no_queen",
            hint="rbee-keeper queen start",
        )
    if queen.owner != OPERATOR:
        note(f"note: the queen at {queen.url} ends with the command that owns it ({queen.owner})")
    return queen


def check_choice(flags: WorkerStopFlags, ids: tuple[str, ...]) -> None:
    """Refuse a ``worker stop`` that does not say what, or says it twice.

    Raises:
        UsageError: which it is.
    """
    said = [bool(ids), flags.model is not None, flags.all]
    if sum(said) != 1:
        raise UsageError(
            "worker stop needs one of: ids of workers, --model M, --all"
            + ("" if not any(said) else "; there was more than one"),
            hint="rbee-keeper worker list",
        )


async def stop_workers(flags: WorkerStopFlags, ids: tuple[str, ...]) -> None:
    """``worker stop``: the seconds that each took on stdout; what is gone already is fine."""
    async with open_queen(flags) as queen:
        if queen is None:
            note(NO_QUEEN)
        rows: list[dict[str, Any]] = []
        failed: list[RbeeError] = []
        wanted = await _wanted(queen.client, flags, ids) if queen else ()
        async with trio.open_nursery() as nursery:
            for worker_id in dict.fromkeys(wanted):
                assert queen is not None
                nursery.start_soon(_stop, queen.client, worker_id, rows, failed, flags.json)
    if queen and not rows:
        note("no such worker" if flags.model else "no workers")
    if flags.json:
        print_json(rows)
    if failed:
        raise failed[0]


async def _wanted(
    client: AsyncClient, flags: WorkerStopFlags, ids: tuple[str, ...]
) -> tuple[str, ...]:
    if ids:
        return ids
    workers = await client.workers()
    if flags.model is not None:
        workers = of_model(workers, flags.model, find_home(flags.home))
    return tuple(worker.worker_id for worker in workers)


def of_model(workers: list[WorkerInfo], model: str, home: Home) -> list[WorkerInfo]:
    """Return those that serve a model, whichever of its names is given."""
    aliases = load_config(home.config_file).aliases
    wanted = meanings(absolute(model), aliases)

    def serves(worker: WorkerInfo) -> bool:
        names = {worker.model, *worker.served_names, *meanings(worker.model, aliases)}
        return not names.isdisjoint(wanted)

    return [worker for worker in workers if serves(worker)]


async def _stop(
    client: AsyncClient,
    worker_id: str,
    rows: list[dict[str, Any]],
    failed: list[RbeeError],
    as_json: bool,
) -> None:
    begin, stopped = trio.current_time(), True
    try:
        await client.stop_worker(worker_id)
    except NotFoundError:
        stopped = False
        note(f"{worker_id} does not run")
    except RbeeError as exc:  # the others are stopped nevertheless
        stopped = False
        failed.append(exc)
    seconds = round(trio.current_time() - begin, 2) if stopped else 0.0
    rows.append({"worker_id": worker_id, "stopped": stopped, "seconds": seconds})
    if stopped and not as_json:
        print_data(f"{worker_id} stopped in {seconds:.2f} s")
