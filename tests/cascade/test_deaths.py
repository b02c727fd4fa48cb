"""Each process × each signal once, in rotated states; ten of them on real vLLM."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
import trio

from rbee.testing.cluster import PROCESSES, Workload
from rbee.testing.deaths import (
    SIGNALS,
    STATES,
    Cell,
    Result,
    all_cells,
    rotated_cells,
    run_cells,
    run_chains,
)
from rbee.testing.tiny_model import write_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.alone]

# One cluster each: it goes on when a part is struck, and the zygote has to import vLLM only once.
VLLM_CHAINS = [
    [
        Cell("hive", signal.SIGKILL, "loading"),
        Cell("guard A", signal.SIGKILL, "idle"),
        Cell("keeper", signal.SIGKILL, "streaming"),
    ],
    [
        Cell("worker guard", signal.SIGKILL, "streaming"),
        Cell("worker", signal.SIGKILL, "streaming"),
        Cell("engine", signal.SIGKILL, "idle"),
        Cell("zygote", signal.SIGKILL, "streaming"),
    ],
    [Cell("queen", signal.SIGKILL, "streaming")],
    [Cell("queen", signal.SIGTERM, "loading")],
    [Cell("engine", signal.SIGSTOP, "streaming")],
]


def test_rotation_holds_each_process_and_signal_once_and_each_state() -> None:
    cells = rotated_cells()
    assert len(set(cells)) == len(PROCESSES) * len(SIGNALS)
    assert {(cell.process, cell.state) for cell in cells} == {
        (process, state) for process in PROCESSES for state in STATES
    }
    assert set(cells) < set(all_cells())


@pytest.fixture(scope="module")
def rotated(request: pytest.FixtureRequest) -> list[Result]:
    """Run all cells of the tests that were chosen: a cell mostly waits, so three at a time."""
    tests = [item for item in request.session.items if item.parent is request.node]
    params = [item.callspec.params for item in tests if hasattr(item, "callspec")]
    chosen = {one["process"] for one in params}
    cells = [cell for cell in rotated_cells() if cell.process in chosen]
    return trio.run(partial(run_cells, cells, Workload.echo(), at_once=3))


@pytest.mark.parametrize("process", PROCESSES)
def test_whatever_is_killed_nothing_is_left(process: str, rotated: list[Result]) -> None:
    results = [result for result in rotated if result.cell.process == process]
    assert len(results) == len(SIGNALS)
    problems = [f"{result.cell}: {result.problem}" for result in results if result.problem]
    assert not problems, "\n".join(problems)


@pytest.mark.vllm
async def test_nothing_of_vllm_is_left(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="needs vLLM: pip install '.[cpu]'")
    workload = Workload.vllm(write_tiny_model(tmp_path / "tiny"))
    results = await run_chains(VLLM_CHAINS, workload, at_once=2)
    problems = [f"{result.cell}: {result.problem}" for result in results if result.problem]
    assert not problems, "\n".join(problems)
    assert len(results) == 10
    loaded = [result for result in results if result.cell.state in ("idle", "streaming")]
    assert len(loaded) == 8
    for result in loaded:  # vLLM's own process was there, and is gone
        assert any("VLLM::EngineCore" in title for title in result.titles), result.cell
