"""Reaching nodes: one attempt at a time for each, which goes on, and is remembered."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.errors import RbeeError, UnavailableError
from rbee.queen.attempts import PATIENCE, START, Attempts, Narrate
from rbee.wire.messages import Narration

DOWN = UnavailableError("connection refused", code="unreachable")


@attrs.define(eq=False)
class FakeNodes:
    """Nodes to get hives from: a hive is the node's name and the number of the try.

    Attributes:
        seconds: that a node takes; it tells of an ``action`` every ``steps`` seconds.
        errors: why a node is not reached.
        tried: the time and the node of each try.
    """

    seconds: dict[str, float] = attrs.field(factory=dict)
    steps: float = 1000.0
    action: str = "connect"
    errors: dict[str, RbeeError] = attrs.field(factory=dict)
    tried: list[tuple[float, str]] = attrs.field(factory=list)
    began: float = attrs.field(factory=trio.current_time)

    async def get(self, node: str, narrate: Narrate) -> Any:
        self.tried.append((trio.current_time() - self.began, node))
        number, left = len(self.tried), self.seconds.get(node, 0.0)
        while left > 0:
            await trio.sleep(min(left, self.steps))
            left -= self.steps
            narrate(Narration("queen", self.action, f"to {node}"))
        await trio.lowlevel.checkpoint()
        if node in self.errors:
            raise self.errors[node]
        return f"{node}-{number}"


@asynccontextmanager
async def open_attempts(**nodes: Any) -> AsyncGenerator[tuple[Attempts, FakeNodes]]:
    fake = FakeNodes(**nodes)
    attempts = Attempts(fake.get)
    async with attempts.open():
        yield attempts, fake


async def test_two_who_want_a_node_share_one_attempt_and_hear_of_it(
    autojump_clock: trio.abc.Clock,
) -> None:
    told: list[Narration] = []
    found: list[Any] = []
    async with open_attempts(seconds={"mac": 3}) as (attempts, _):

        async def get() -> None:
            found.append(await attempts.get("mac", told.append))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(get)
            nursery.start_soon(get)
            await wait_all_tasks_blocked()
            assert attempts.silent("mac") == 0
        assert found == ["mac-1", "mac-1"]
        assert [one.text for one in told] == ["to mac", "to mac"]
        assert attempts.silent("mac") is None
        assert await attempts.get("mac", told.append) == "mac-2"


async def test_an_attempt_goes_on_when_who_wanted_it_has_gone(
    autojump_clock: trio.abc.Clock,
) -> None:
    told: list[Narration] = []
    async with open_attempts(seconds={"mac": 3}, errors={"mac": DOWN}) as (attempts, _):
        with trio.move_on_after(1):
            await attempts.get("mac", told.append)
        await trio.sleep(5)
        failure = attempts.failure("mac")
        assert failure is not None
        assert (failure.error, trio.current_time() - failure.at) == (DOWN, 3)
    assert told == []  # nobody is there to hear it


async def test_a_success_ends_what_was_held_against_a_node() -> None:
    async with open_attempts(errors={"mac": DOWN}) as (attempts, nodes):
        with pytest.raises(UnavailableError, match="refused"):
            await attempts.get("mac", print)
        assert attempts.failure("mac") is not None
        nodes.errors.clear()
        assert await attempts.get("mac", print) == "mac-2"
        assert attempts.failure("mac") is None


async def test_whoever_waits_when_the_queen_stops_is_told() -> None:
    async with trio.open_nursery() as nursery:
        caught: list[str] = []

        async def get() -> None:
            try:
                await attempts.get("mac", print)
            except UnavailableError as exc:
                caught.append(exc.code)

        async with open_attempts(seconds={"mac": 100}) as (attempts, _):
            nursery.start_soon(get)
            await wait_all_tasks_blocked()
    await get()
    assert caught == ["queen_stopping"] * 2


# the first of several -----------------------------------------------------------------------------
async def first(attempts: Attempts, *nodes: str) -> tuple[Any, list[str]]:
    told: list[Narration] = []
    hive = await attempts.first(nodes, told.append)
    return hive, [f"{one.action} {one.text}" for one in told]


async def test_a_node_that_fails_makes_the_next_one_take_its_place_at_once() -> None:
    async with open_attempts(errors={"mac": DOWN}) as (attempts, nodes):
        hive, told = await first(attempts, "mac", "linux", "other")
        assert (hive, told) == ("linux-2", ["skip mac: connection refused; trying linux"])
        assert [node for _, node in nodes.tried] == ["mac", "linux"]


async def test_a_node_that_tells_nothing_does_not_keep_the_others_waiting(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_attempts(seconds={"mac": 60}, errors={"mac": DOWN}) as (attempts, nodes):
        hive, told = await first(attempts, "mac", "linux")
        assert (hive, told) == ("linux-2", ["skip mac: no answer for 5 s; trying linux"])
        assert nodes.tried == [(0, "mac"), (PATIENCE, "linux")]
        await trio.sleep(60)
        assert attempts.failure("mac") is not None  # it went on, and is known to be dead


async def test_a_node_that_goes_on_telling_is_waited_for(autojump_clock: trio.abc.Clock) -> None:
    async with open_attempts(seconds={"mac": 40}, steps=4.0) as (attempts, nodes):
        hive, _ = await first(attempts, "mac", "linux")
        assert hive == "mac-1"
        assert trio.current_time() - nodes.began == 40


@pytest.mark.parametrize(("action", "waited"), [("connect", 2 + PATIENCE), ("start", 2 + START)])
async def test_a_node_that_was_reached_may_take_longer_to_tell_more(
    autojump_clock: trio.abc.Clock, action: str, waited: float
) -> None:
    async with open_attempts(seconds={"mac": 99}, action=action) as (attempts, nodes):

        async def tell_once() -> None:
            await trio.sleep(2)
            attempts.begin("mac").tell(Narration("queen", action, "mac"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell_once)
            assert (await first(attempts, "mac", "linux"))[0] == "linux-2"
        assert nodes.tried[1] == (waited, "linux")
        assert attempts.silent("mac") == waited - 2


async def test_a_node_that_was_lost_again_is_not_one_that_was_reached(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_attempts(seconds={"mac": 99}) as (attempts, nodes):

        async def tell() -> None:
            await trio.sleep(2)
            for action in ("start", "connect"):
                attempts.begin("mac").tell(Narration("queen", action, "mac"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            assert (await first(attempts, "mac", "linux"))[0] == "linux-2"
        assert nodes.tried[1] == (2 + PATIENCE, "linux")


async def test_a_slow_node_is_taken_if_it_is_quicker_after_all(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_attempts(seconds={"mac": 7, "linux": 90}) as (attempts, nodes):
        hive, _ = await first(attempts, "mac", "linux")
        assert hive == "mac-1"
        assert trio.current_time() - nodes.began == 7


async def test_when_all_fail_there_is_none(autojump_clock: trio.abc.Clock) -> None:
    errors = {"mac": DOWN, "linux": DOWN}
    async with open_attempts(seconds={"mac": 9}, errors=errors) as (attempts, nodes):
        assert (await first(attempts, "mac", "linux"))[0] is None
        assert trio.current_time() - nodes.began == 9
        assert None not in (attempts.failure("mac"), attempts.failure("linux"))


async def test_who_waited_for_a_node_that_failed_meanwhile_does_not_try_it_again(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_attempts(seconds={"mac": 30.0}, errors={"mac": DOWN}) as (attempts, fake):
        asked = trio.current_time()
        for _ in range(3):  # as in turn
            with pytest.raises(UnavailableError):
                await attempts.get("mac", lambda narration: None, since=asked)
        assert fake.tried == [(0.0, "mac")]
        with pytest.raises(UnavailableError):
            await attempts.get("mac", lambda narration: None, since=trio.current_time() + 1)
        assert len(fake.tried) == 2
