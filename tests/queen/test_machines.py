"""The nodes of a queen: SSH is there when it is needed, whoever gives up on the way."""

from __future__ import annotations

import importlib
import time
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.home import Home
from rbee.queen.machine import QueenSetup
from rbee.queen.machines import Machines


@pytest.fixture
def machines(home: Home, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Make the nodes of a queen whose SSH takes its time to be imported."""
    load = importlib.import_module

    def load_slowly(name: str) -> Any:
        time.sleep(0.3)
        return load(name)

    monkeypatch.setattr(importlib, "import_module", load_slowly)
    return Machines(QueenSetup("queen-1", home, home.run / "q1", "secret", "nonce"))


async def test_whoever_is_cancelled_while_ssh_is_loaded_holds_up_nobody(machines: Machines) -> None:
    with trio.fail_after(30):
        async with machines.open():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(machines.ssh)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            assert (await machines.ssh()).fenced_for("mac") == 0.0


async def test_the_queens_end_waits_for_ssh_to_be_loaded_and_no_longer(machines: Machines) -> None:
    async def use() -> None:
        async with machines.open():
            await machines.ssh()
            await trio.sleep_forever()

    with trio.fail_after(30) as limit:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert not limit.cancelled_caught
    assert not machines.takes_tasks
