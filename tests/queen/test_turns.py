"""What shares a name goes one after the other, and nothing else waits."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from rbee.queen.turns import Turns


async def test_those_with_a_common_name_take_turns(autojump_clock: trio.abc.Clock) -> None:
    turns, over = Turns(), {}

    async def take(*names: str) -> None:
        async with turns.take(names):
            await trio.sleep(1)
        over[names[0]] = trio.current_time() - began

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for names in (("a", "x"), ("b", "x", "y"), ("c", "y"), ("d",)):
            nursery.start_soon(take, *names)
    assert over["d"] == 1
    assert over["b"] not in (over["a"], over["c"])
    assert max(over.values()) <= 3


async def test_a_turn_that_is_cancelled_is_over() -> None:
    turns = Turns()

    async def hold() -> None:
        async with turns.take(["a"]):
            await trio.sleep_forever()

    with trio.fail_after(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        async with turns.take(["a"]):
            pass
