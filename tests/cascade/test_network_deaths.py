"""Each way in which a queen and its node can lose each other, in each state."""

from __future__ import annotations

import pytest

from rbee.testing.network_deaths import STATES, STRIKES, all_cells, rotated_cells, run_cells
from tests.cascade.far import open_far_hosts

pytestmark = pytest.mark.slow


def test_rotation_holds_each_strike_once_and_each_state() -> None:
    cells = rotated_cells()
    assert [cell.strike for cell in cells] == list(STRIKES)
    assert {cell.state for cell in cells} == set(STATES)
    assert {str(cell) for cell in cells} < {str(cell) for cell in all_cells()}


async def test_whatever_is_lost_nothing_is_left_on_the_node() -> None:
    with open_far_hosts("n0", "n1", "n2") as hosts:
        can_cut = all(host.can_partition for host in hosts.values())
        cells = [cell for cell in all_cells() if can_cut or not cell.strike.cut]
        results = await run_cells(cells, hosts)
    assert len(results) == (49 if can_cut else 42)
    problems = [f"{result.cell}: {result.problem}" for result in results if result.problem]
    assert not problems, "\n".join(problems)
