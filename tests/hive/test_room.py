"""Who goes for one more model, in simulated time."""

from __future__ import annotations

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.errors import InsufficientError
from rbee.hive.room import WAIT, Memory, Room
from rbee.model import WorkerState
from rbee.models.footprint import MemoryPlan

TOTAL = 100


def need(size: int) -> MemoryPlan:
    return MemoryPlan(size, 0, 0)


@attrs.define(eq=False)
class Guest:
    name: str
    plan: MemoryPlan | None = None
    state: WorkerState = WorkerState.READY
    idle: float = 1.0
    is_pinned: bool = False
    backend: str = "cpu"
    device: str = "0"


def guest(name: str, size: int, **more: object) -> Guest:
    return Guest(name, need(size), **more)


@attrs.define(eq=False, slots=False)
class House:
    """A machine with `TOTAL` bytes, all of them counted as the kernel would."""

    guests: list[Guest]
    budget: int | None = None
    knows: bool = True
    gone: list[str] = attrs.field(factory=list)
    told: list[str] = attrs.field(factory=list)
    asked: list[Guest] = attrs.field(factory=list)
    asked_in_vain: list[str] = attrs.field(factory=list)
    room: Room = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        memory = Memory(
            plan=no_plan,
            free=self.look_free,
            check=check,
            budget=self.budget,
        )
        self.room = Room(memory, lambda: self.guests, trio.lowlevel.checkpoint, self.unload)

    async def look_free(self, backend: str, device: str) -> int | None:
        await trio.lowlevel.checkpoint()
        return self.free(backend, device)

    def free(self, backend: str, device: str) -> int | None:
        there = [one for one in self.guests if one.plan and one.state is WorkerState.READY]
        return TOTAL - sum(one.plan.required for one in there) if self.knows else None

    async def unload(self, one: Guest) -> bool:
        if one in self.asked:
            return False
        self.asked.append(one)
        await trio.sleep(1)
        self.asked.remove(one)
        if one.idle == 0 or one.name in self.asked_in_vain:
            one.idle = 0
            return False
        self.guests.remove(one)
        self.gone.append(one.name)
        return True

    async def make(self, size: int, newcomer: Guest | None = None) -> Guest:
        newcomer = newcomer or Guest("new", state=WorkerState.STARTED)
        self.guests.append(newcomer)
        try:
            await self.room.make(
                need(size), newcomer, lambda action, text: self.told.append(action)
            )
        except BaseException:
            self.guests.remove(newcomer)
            raise
        newcomer.plan = need(size)
        return newcomer

    async def look(self, plan: MemoryPlan, newcomer: Guest) -> None:
        await self.room.make(plan, newcomer, lambda action, text: self.told.append(action))


async def no_plan(local: object, request: object) -> None:
    await trio.lowlevel.checkpoint()


def check(plan: MemoryPlan, available: int, *, model: str, bound: str) -> None:
    if plan.required > available:
        raise InsufficientError("full", required=plan.required, available=available)


async def test_where_there_is_room_nobody_goes(autojump_clock: trio.abc.Clock) -> None:
    house = House([guest("a", 40)])
    await house.make(60)
    assert house.gone == house.told == []


async def test_the_least_recently_used_go_until_there_is_room(
    autojump_clock: trio.abc.Clock,
) -> None:
    house = House([guest("a", 30, idle=5), guest("b", 30, idle=9), guest("c", 30, idle=7)])
    await house.make(50)
    assert house.gone == ["b", "c"]
    assert house.told == ["unload", "unload"]


@pytest.mark.parametrize(
    "stays",
    [
        {"is_pinned": True},
        {"state": WorkerState.STOPPING},
        {"state": WorkerState.UNRESPONSIVE},
    ],
)
async def test_the_pinned_and_the_unwell_do_not_go(
    stays: dict[str, object], autojump_clock: trio.abc.Clock
) -> None:
    house = House([guest("a", 60, **stays)], budget=TOTAL)
    with pytest.raises(InsufficientError) as info:
        await house.make(50)
    assert info.value.details == {"required": 50, "available": 40}
    assert house.gone == []


async def test_who_could_go_stays_when_it_would_not_be_enough(
    autojump_clock: trio.abc.Clock,
) -> None:
    house = House([guest("a", 60), guest("b", 40, is_pinned=True)])
    with pytest.raises(InsufficientError):
        await house.make(70)
    assert house.gone == []


async def test_a_busy_one_is_waited_for_and_goes_once_it_is_idle(
    autojump_clock: trio.abc.Clock,
) -> None:
    busy = guest("a", 60, idle=0)
    house = House([busy])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.make, 50)
        await trio.sleep(10)
        assert house.told == ["wait"]
        busy.idle = 1
    assert house.gone == ["a"]


async def test_one_that_stays_busy_is_never_ended_and_the_wait_is_bounded(
    autojump_clock: trio.abc.Clock,
) -> None:
    house = House([guest("a", 60, idle=0)])
    start = trio.current_time()
    with pytest.raises(InsufficientError):
        await house.make(50)
    assert trio.current_time() - start == pytest.approx(WAIT)
    assert house.gone == []


async def test_one_that_got_work_meanwhile_stays_and_the_next_goes(
    autojump_clock: trio.abc.Clock,
) -> None:
    house = House([guest("a", 50, idle=9), guest("b", 50, idle=5)], asked_in_vain=["a"])
    await house.make(50)
    assert house.gone == ["b"]


async def test_what_was_promised_to_one_that_loads_is_not_given_twice(
    autojump_clock: trio.abc.Clock,
) -> None:
    house = House([guest("a", 60, state=WorkerState.LOADING)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.make, 50)
        await trio.sleep(5)
        (loading,) = (one for one in house.guests if one.name == "a")
        assert house.gone == []
        loading.state, loading.idle = WorkerState.READY, 1
    assert house.gone == ["a"]


async def test_two_starts_do_not_count_on_the_same_memory(autojump_clock: trio.abc.Clock) -> None:
    house = House([guest("a", 60), guest("b", 40)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.make, 60, Guest("x", state=WorkerState.STARTED))
        nursery.start_soon(house.make, 40, Guest("y", state=WorkerState.STARTED))
    assert sorted(house.gone) == ["a", "b"]


async def test_a_start_that_is_given_up_holds_up_nobody(autojump_clock: trio.abc.Clock) -> None:
    house = House([guest("a", 60, idle=0)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.make, 50)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert (await house.make(30)).plan == need(30)


async def test_a_budget_bounds_what_all_take_together(autojump_clock: trio.abc.Clock) -> None:
    house = House([guest("a", 30)], budget=50, knows=False)
    await house.make(30)
    assert house.gone == ["a"]
    with pytest.raises(InsufficientError):
        await House([], budget=50, knows=False).make(60)


async def test_where_nobody_knows_what_is_free_nothing_is_refused(
    autojump_clock: trio.abc.Clock,
) -> None:
    house = House([guest("a", 90)], knows=False)
    assert (await house.make(1000)).plan == need(1000)
    assert house.gone == []


async def test_only_those_on_the_same_device_go(autojump_clock: trio.abc.Clock) -> None:
    cuda = {"backend": "cuda"}
    there = [
        guest("cpu", 60, idle=9),
        guest("other", 60, device="1", idle=8, **cuda),
        guest("same", 60, device="0,2", idle=1, **cuda),
    ]
    house = House(there)
    house.free = lambda *where: 40 if "same" not in house.gone else 100
    await house.make(90, Guest("new", state=WorkerState.STARTED, **cuda))
    assert house.gone == ["same"]


async def test_one_that_is_going_already_is_waited_for(autojump_clock: trio.abc.Clock) -> None:
    going = guest("a", 80, state=WorkerState.STOPPING)
    house = House([going], budget=TOTAL)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.make, 80)
        await trio.sleep(2)
        assert house.told == ["wait"]
        house.guests.remove(going)


async def test_a_start_that_waits_holds_up_no_other(autojump_clock: trio.abc.Clock) -> None:
    house = House([guest("a", 60, idle=0)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.make, 50)
        await trio.sleep(1)
        start = trio.current_time()
        await house.make(30, Guest("small", state=WorkerState.STARTED))
        assert trio.current_time() == start
        nursery.cancel_scope.cancel()
