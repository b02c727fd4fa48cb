"""``python -m rbee.testing.deaths``: kill everything, everywhere, in every state, and look.

A cell is one process of a running cluster × one signal × one moment. Each cell starts a cluster of
its own (``rbee-keeper run`` with its queen, guards, hive, zygote and worker), brings it into the
state, sends the signal, and then holds it to the survivor table: what lies under the fault goes,
the rest stays and the next ``infer`` works, and after the owner's end nothing is left, within the
budget: no process, no listening socket, no file in the run directory, no shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import attrs
import trio

from rbee.guard import send_signal
from rbee.process import log_tail
from rbee.testing.cluster import PROCESSES, Cluster, Workload, keeper_argv, open_cluster
from rbee.testing.processes import Identity, LeakError, Tree, is_running, title_of
from rbee.testing.verdict import Fault, problems

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGSTOP)
STATES = ("starting", "loading", "idle", "streaming", "stopping")
OWNERS = ("keeper", "queen guard", "queen")  # with one of them everything goes
BUDGET = 10.0  # seconds from the order until nothing is left
PART_BUDGET = 8.0  # seconds until what lay under a killed process is gone
IGNORED = {  # who lives on after which signal, with all below; everybody else goes
    "zygote": (signal.SIGINT, signal.SIGHUP),  # once it has set that: the hive ends it
}
VENV_WITHIN = 3.0  # seconds until nothing is left that only its mapped files give away
IGNORING = 1.0  # seconds in which a process that does not ignore a signal would have gone


@attrs.frozen
class Cell(Fault):
    """One process × one signal × one state."""

    def __str__(self) -> str:
        return f"{self.signal.name} {self.process} {self.state}"


@attrs.frozen
class Result:
    """``seconds``: from the order to the end of everything; ``problem`` is "" if all held.

    In a chain that goes on they end with the part that was struck.
    ``titles`` are those of all processes that were there when the signal was sent.
    """

    cell: Cell
    seconds: float
    problem: str = ""
    titles: frozenset[str] = frozenset()


class CellError(AssertionError):
    """A cell did not hold what the survivor table says."""


def all_cells() -> list[Cell]:
    return [Cell(*parts) for parts in product(PROCESSES, SIGNALS, STATES)]


def rotated_cells() -> list[Cell]:
    """Each process × each signal once, the states taken in turn."""
    pairs = product(enumerate(PROCESSES), enumerate(SIGNALS))
    return [
        Cell(process, number, STATES[(row + 2 * column) % len(STATES)])
        for (row, process), (column, number) in pairs
    ]


# one cell -------------------------------------------------------------------------------------
async def run_cell(cell: Cell, workload: Workload) -> Result:
    """Run one cell; what did not hold is in the result, not raised."""
    (result,) = await run_chain([cell], workload)
    return result


async def run_chain(chain: Sequence[Cell], workload: Workload) -> list[Result]:
    """Run cells in turn in one cluster, up to the first that does not hold.

    All but the last must end a part only; ``loading`` and ``starting`` come first, if at all.
    """
    results: list[Result] = []
    began = trio.current_time()
    try:
        async with open_cluster(workload, chain[0].state) as cluster:
            try:
                for cell in chain:
                    began = trio.current_time()
                    victim = await reach(cell, cluster, workload)
                    titles = frozenset(title_of(one.pid) for one in cluster.tree.running())
                    seconds = await strike(cell, victim, cluster, workload, cell is chain[-1])
                    results.append(Result(cell, seconds, titles=titles))
                check_end(chain[-1], cluster)
            except (CellError, LeakError, trio.TooSlowError) as exc:
                exc.add_note(explain(cluster))
                raise
    except BaseExceptionGroup as group:
        matched, rest = group.split((CellError, LeakError, trio.TooSlowError))
        if rest is not None:
            raise
        assert matched is not None
        problem = "\n".join(_text(error) for error in _leaves(matched))
        held = results[: len(chain) - 1]
        return [*held, Result(chain[len(held)], trio.current_time() - began, problem)]
    return results


def check_end(cell: Cell, cluster: Cluster) -> None:
    """Hold the keeper's end and all logs to what such a cell must leave."""
    assert cluster.check.home is not None
    code, said = cluster.keeper.poll(), cluster.keeper_log
    if wrong := list(problems(cell, code, said, cluster.check.home)):
        raise CellError("\n".join(wrong))


def explain(cluster: Cluster) -> str:
    """Return what is there and the ends of the logs, for a cell that did not hold."""
    home = cluster.check.home
    assert home is not None
    lines = [str(left) for left in cluster.check.find()]
    for path in [cluster.keeper_log, *sorted(home.logs.glob("*.log"))]:
        lines += [f"--- {path.name}", log_tail(path, 1500)]
    return "\n".join(lines)


def _text(error: BaseException) -> str:
    return "\n".join([repr(error), *getattr(error, "__notes__", ())])


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


async def reach(cell: Cell, cluster: Cluster, workload: Workload) -> Identity:
    """Bring the cluster into the cell's state and return the process to strike."""
    said = len(cluster.output)
    with trio.fail_after(workload.patience):
        cluster.say("one two three four five")
        if cell.state == "loading":
            await cluster.until_there("worker")
        elif cell.state == "streaming":
            await cluster.until_output(said + 12)
        elif cell.state in ("idle", "stopping"):
            await _until_answered(cluster, said)
        victim = await cluster.until_there(cell.process)
    if cell.state == "stopping":
        cluster.keeper.send_signal(signal.SIGTERM)
        await trio.sleep(0.03)
    cluster.tree.refresh(cluster.keeper.pid)
    return victim


async def _until_answered(cluster: Cluster, said: int) -> None:
    while len(cluster.output) == said or not cluster.output.endswith(b"\n"):
        await cluster.until_output(len(cluster.output) + 1)


async def strike(
    cell: Cell, victim: Identity, cluster: Cluster, workload: Workload, is_last: bool = True
) -> float:
    """Send the signal and hold the cluster to the survivor table; return the seconds to clean."""
    began = trio.current_time()
    below = _below(victim)
    spared = [one for name, one in cluster.places() if name in survivors(cell.process)]
    # While stopping it may have gone already.
    send_signal(victim.pid, victim.start, cell.signal)
    if cell.state == "stopping":
        await _all_gone(cluster, cell)
    elif cell.signal == signal.SIGSTOP:
        await _nothing_died(victim, below)
        began = trio.current_time()
        _end_owner(cell, cluster)
        await _all_gone(cluster, cell)
    elif cell.process in OWNERS:
        await _interrupt_again(cell, cluster)
        await _all_gone(cluster, cell)
    else:
        await _part_gone(cell, victim, below)
        took = trio.current_time() - began
        _check_alive(spared)
        await _next_infer_works(cluster, workload, cell.state)
        _check_alive(spared)
        if not is_last:
            return took
        began = trio.current_time()
        cluster.keeper.send_signal(signal.SIGTERM)
        await _all_gone(cluster, cell)
    return trio.current_time() - began


async def _interrupt_again(cell: Cell, cluster: Cluster) -> None:
    """In a conversation the first SIGINT ends the answer, the second the conversation."""
    if (cell.process, cell.signal) == ("keeper", signal.SIGINT):
        await trio.sleep(0.3)
        if cluster.keeper.poll() is None:
            cluster.keeper.send_signal(signal.SIGINT)


def survivors(process: str) -> tuple[str, ...]:
    """Name what must outlive the end of a process."""
    if process in OWNERS:
        return ()
    if process in ("guard A", "guard B", "hive"):
        return OWNERS
    return PROCESSES[: PROCESSES.index("zygote" if process == "zygote" else "worker guard")]


def _check_alive(spared: Sequence[Identity]) -> None:
    if dead := [one for one in spared if not is_running(one)]:
        raise CellError(f"{len(dead)} died that must live: {dead}")


def _below(victim: Identity) -> list[Identity]:
    with Tree(victim.pid) as tree:
        return list(tree.noted)


async def _nothing_died(victim: Identity, below: Sequence[Identity]) -> None:
    await trio.sleep(0.5)
    dead = [one for one in (victim, *below) if not is_running(one)]
    if dead:
        raise CellError(f"a frozen process killed {len(dead)}: {dead}")


def _end_owner(cell: Cell, cluster: Cluster) -> None:
    """End the frozen process's owner: the keeper, or for the keeper its own end by force."""
    cluster.keeper.send_signal(signal.SIGKILL if cell.process == "keeper" else signal.SIGTERM)


async def _part_gone(cell: Cell, victim: Identity, below: Sequence[Identity]) -> None:
    """The signal ends the process and all below it, unless the table says that it ignores it."""
    ignores = cell.signal in IGNORED.get(cell.process, ())
    with trio.move_on_after(IGNORING if ignores else PART_BUDGET):
        while any(is_running(one) for one in (victim, *below)):
            await trio.sleep(0.02)
        return
    if not is_running(victim):
        raise CellError(f"under the fault {[o for o in below if is_running(o)]} live on")
    if not ignores:
        raise CellError(f"{cell.process} ignores {cell.signal.name}")
    if dead := [one for one in below if not is_running(one)]:
        raise CellError(f"it ignores {cell.signal.name}, but below it went {dead}")


async def _next_infer_works(cluster: Cluster, workload: Workload, state: str) -> None:
    """Another command against the same queen gets an answer."""
    argv = [*keeper_argv("infer", workload.model_for(state), workload), "--prompt", "one two"]
    argv[argv.index("400")] = "4"
    child = subprocess.Popen(
        argv, env=cluster.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    pidfd = os.pidfd_open(child.pid)
    try:
        with trio.fail_after(workload.patience):
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)
        child.kill()
        out, err = child.communicate()
    if child.returncode != 0 or not out.strip():
        raise CellError(f"the next infer failed ({child.returncode}): {err.decode()[-400:]}")


async def _all_gone(cluster: Cluster, cell: Cell) -> None:
    with trio.fail_after(BUDGET + 5):
        while cluster.keeper.poll() is None and not _frozen(cell, cluster):
            await trio.sleep(0.01)
        await cluster.check.wait_clean(BUDGET)
        # Not looked for in the first place: between fork and exec another cell's keeper seems to be
        # an orphan for a moment.
        of_venv = attrs.evolve(cluster.check, venv=Path(sys.prefix))
        await of_venv.wait_clean(VENV_WITHIN)


def _frozen(cell: Cell, cluster: Cluster) -> bool:
    """A keeper stopped while it was stopping has no owner but us: end it."""
    if cell.process == "keeper" and cell.signal == signal.SIGSTOP:
        cluster.keeper.kill()
    return False


# all cells ------------------------------------------------------------------------------------
async def run_cells(
    cells: Sequence[Cell], workload: Workload, *, at_once: int = 2, report: Any = None
) -> list[Result]:
    """Run cells, some at a time, and return their results in order."""
    return await run_chains([[cell] for cell in cells], workload, at_once=at_once, report=report)


async def run_chains(
    chains: Sequence[Sequence[Cell]], workload: Workload, *, at_once: int = 2, report: Any = None
) -> list[Result]:
    """Run chains of cells, some at a time, and return the results in order."""
    results: dict[int, list[Result]] = {}
    limit = trio.CapacityLimiter(at_once)

    async def one(number: int, chain: Sequence[Cell]) -> None:
        async with limit:
            results[number] = await run_chain(chain, workload)
            for result in results[number]:
                if report is not None:
                    report(result)

    async with trio.open_nursery() as nursery:
        for number, chain in enumerate(chains):
            nursery.start_soon(one, number, chain)
    return [result for number in sorted(results) for result in results[number]]


def table(results: Sequence[Result]) -> str:
    """Lay the results out: a row per process and signal, a column per state."""
    rows = [["process", "signal", *STATES]]
    found = {result.cell: result for result in results}
    for process, number in product(PROCESSES, SIGNALS):
        row = [process, number.name]
        for state in STATES:
            result = found.get(Cell(process, number, state))
            row.append("-" if result is None else _cell_text(result))
        if set(row[2:]) != {"-"}:
            rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows
    )


def _cell_text(result: Result) -> str:
    return "FAILED" if result.problem else f"{result.seconds:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m rbee.testing.deaths")
    parser.add_argument("--engine", choices=["echo", "vllm"], default="echo")
    parser.add_argument("--rotated", action="store_true", help="each process × signal once")
    parser.add_argument("--only", default="", help="only cells whose name holds this text")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    cells = rotated_cells() if options.rotated else all_cells()
    cells = [cell for cell in cells if options.only in str(cell)]
    with tempfile.TemporaryDirectory(prefix="rbee-tiny-") as directory:
        workload = workload_of(options.engine, Path(directory))
        results = trio.run(_run_and_report, cells, workload, options.at_once)
    sys.stdout.write(table(results) + "\n")
    if options.json:
        options.json.write_text(json.dumps([_as_json(result) for result in results], indent=1))
    failed = [result for result in results if result.problem]
    sys.stdout.write(f"{len(results) - len(failed)} of {len(results)} cells held\n")
    return 1 if failed else 0


def workload_of(engine: str, directory: Path) -> Workload:
    if engine == "echo":
        return Workload.echo()
    from rbee.testing.tiny_model import write_tiny_model

    return Workload.vllm(write_tiny_model(directory / "tiny"))


async def _run_and_report(cells: Sequence[Cell], workload: Workload, at_once: int) -> list[Result]:
    def report(result: Result) -> None:
        what = f"{result.seconds:6.2f} s" if not result.problem else f"FAILED: {result.problem}"
        sys.stderr.write(f"{result.cell!s:40} {what}\n")

    return await run_cells(cells, workload, at_once=at_once, report=report)


def _as_json(result: Result) -> dict[str, Any]:
    cell = result.cell
    return {
        "process": cell.process, "signal": cell.signal.name, "state": cell.state,
        "seconds": round(result.seconds, 3), "problem": result.problem,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
