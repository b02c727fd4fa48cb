"""A queen's lease on an operator's hive: it lasts as long as the queen says so."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.hive.owners import STEP, Owners
from rbee.wire.messages import OwnerLease

LEASE = OwnerLease("http://queen", "token", lease=10.0)


@asynccontextmanager
async def open_owners(ended: dict[str, float]) -> AsyncGenerator[Owners, None]:
    """Note when each lease ended, in seconds from now."""
    start = trio.current_time()

    async def note(owner: str) -> None:
        ended[owner] = trio.current_time() - start

    owners = Owners(note)
    async with owners.open():
        yield owners


async def test_a_lease_ends_by_itself(autojump_clock: trio.abc.Clock) -> None:
    ended: dict[str, float] = {}
    async with open_owners(ended) as owners:
        owners.renew("queen-1", LEASE)
        assert owners.get("queen-1").lease == LEASE
        await trio.sleep(9.9)
        assert ended == {}
        await trio.sleep(1)
    assert ended == pytest.approx({"queen-1": 10.0}, abs=STEP)


async def test_renewing_extends_a_lease_and_takes_the_new_address(
    autojump_clock: trio.abc.Clock,
) -> None:
    ended: dict[str, float] = {}
    moved = OwnerLease("http://moved", "token", lease=3.0)
    async with open_owners(ended) as owners:
        owners.renew("queen-1", LEASE)
        await trio.sleep(8)
        owners.renew("queen-1", LEASE)
        await trio.sleep(8)
        owners.renew("queen-1", moved)
        assert owners.get("queen-1").lease == moved
        await trio.sleep(5)
    assert ended == pytest.approx({"queen-1": 19.0}, abs=STEP)


async def test_a_goodbye_ends_a_lease_at_once(autojump_clock: trio.abc.Clock) -> None:
    ended: dict[str, float] = {}
    async with open_owners(ended) as owners:
        owners.renew("queen-1", LEASE)
        owners.renew("queen-2", LEASE)
        await trio.sleep(1)
        owners.end("queen-1")
        owners.end("never seen")
        await wait_all_tasks_blocked()
        assert ended == pytest.approx({"queen-1": 1.0}, abs=STEP)
        assert owners.get("queen-1") is None
        assert owners.get("queen-2") is not None


async def test_a_queen_may_come_back_while_its_workers_are_being_stopped(
    autojump_clock: trio.abc.Clock,
) -> None:
    stopped: list[str] = []

    async def stop(owner: str) -> None:
        await trio.sleep(4)
        stopped.append(owner)

    owners = Owners(stop)
    async with owners.open():
        owners.renew("queen-1", LEASE)
        await trio.sleep(1)
        owners.end("queen-1")
        await trio.sleep(1)
        owners.renew("queen-1", LEASE)
        await trio.sleep(5)
        assert stopped == ["queen-1"]
        assert owners.get("queen-1") is not None
        await trio.sleep(10)
    assert stopped == ["queen-1", "queen-1"]


async def test_the_end_of_the_hive_ends_no_lease_on_its_own(
    autojump_clock: trio.abc.Clock,
) -> None:
    ended: dict[str, float] = {}
    async with open_owners(ended) as owners:
        owners.renew("queen-1", LEASE)
        await trio.sleep(1)
    assert ended == {}
