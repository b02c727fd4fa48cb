"""Waiting for a registry sees every change that lasts."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from rbee.registry import Registry


def test_values_come_and_go_by_key() -> None:
    registry: Registry[str, int] = Registry()
    registry.set("a", 1)
    registry.set("b", 2)
    registry.set("a", 3)
    registry.remove("b")
    registry.remove("never there")
    assert (registry.get("a"), registry.get("b"), list(registry), len(registry)) == (
        3,
        None,
        [3],
        1,
    )


def test_a_registry_may_change_while_it_is_iterated() -> None:
    registry: Registry[str, int] = Registry()
    registry.set("a", 1)
    for value in registry:
        registry.set("b", value + 1)
        registry.remove("a")
    assert list(registry) == [2]


async def test_what_is_there_is_given_at_once() -> None:
    registry: Registry[str, int] = Registry()
    registry.set("a", 0)
    assert await registry.wait_until(lambda: registry.get("a")) == 0


async def test_all_who_wait_see_each_change() -> None:
    registry: Registry[str, int] = Registry()
    got: list[int] = []

    async def wait(least: int) -> None:
        got.append(
            await registry.wait_until(lambda: next((v for v in registry if v >= least), None))
        )

    async with trio.open_nursery() as nursery:
        for least in (1, 1, 3):
            nursery.start_soon(wait, least)
        await wait_all_tasks_blocked()
        registry.set("a", 1)
        await wait_all_tasks_blocked()
        assert got == [1, 1]
        registry.set("a", 2)
        await wait_all_tasks_blocked()
        registry.set("a", 3)
    assert got == [1, 1, 3]


async def test_a_removal_is_a_change() -> None:
    registry: Registry[str, int] = Registry()
    registry.set("a", 1)

    async def wait() -> None:
        await registry.wait_until(lambda: None if len(registry) else 0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        registry.remove("a")


async def test_removing_what_is_gone_lets_everybody_look_again() -> None:
    registry: Registry[str, int] = Registry()
    reasons: dict[str, int] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(registry.wait_until, lambda: reasons.get("a"))
        await wait_all_tasks_blocked()
        reasons["a"] = 1
        registry.remove("a")


async def test_a_change_between_two_looks_is_not_lost() -> None:
    registry: Registry[str, int] = Registry()
    looks: list[int | None] = []

    def look() -> int | None:
        looks.append(registry.get("a"))
        if len(looks) == 1:
            registry.remove("nothing")
        return looks[-1]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(registry.wait_until, look)
        await wait_all_tasks_blocked()
        registry.set("b", 1)
        registry.set("a", 1)
    assert looks == [None, 1]
