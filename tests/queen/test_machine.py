"""The hive that is started before its queen asks for it: it is hers to have, and to hear of."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.errors import MachineError, RbeeError
from rbee.home import Home
from rbee.queen import machine
from rbee.queen.machine import FirstHive, LocalMachine, QueenSetup, start_of
from rbee.queen.machines import Machines
from rbee.scopes import open_service
from rbee.wire.messages import DaemonStart, Narration


@attrs.define(eq=False)
class FakeHives:
    """Takes the place of real ones; each says hello when it may."""

    may_say_hello: trio.Event = attrs.field(factory=trio.Event)
    error: RbeeError | None = None
    left: RbeeError | None = None
    log: list[str] = attrs.field(factory=list)

    @asynccontextmanager
    async def open(self, setup: QueenSetup, start: DaemonStart) -> AsyncGenerator[Any, None]:
        self.log.append("started")
        await self.may_say_hello.wait()
        if self.error:
            raise self.error
        try:
            yield self
        finally:
            self.log.append("ended")
            if self.left:
                raise self.left


Made = tuple[FakeHives, FirstHive, LocalMachine]


@pytest.fixture
def made(home: Home, monkeypatch: pytest.MonkeyPatch) -> Made:
    setup = QueenSetup("queen-1", home, home.run / "q1", "secret", "nonce", engine="echo")
    hives = FakeHives()
    monkeypatch.setattr(machine, "open_local_hive", hives.open)
    first = FirstHive(setup, start_of(setup, "http://127.0.0.1:1", engine="echo"))
    return hives, first, LocalMachine(setup, first)


async def test_it_starts_at_once_and_is_had_once_it_has_said_hello(made: Made) -> None:
    hives, first, local = made
    had = trio.Event()

    async def have() -> None:
        async with local.open_hive(first.start) as hive:
            assert hive is hives
            had.set()
        hives.log.append("left")

    async with open_service(first.keep), trio.open_nursery() as nursery:
        assert hives.log == ["started"]
        nursery.start_soon(have)
        await wait_all_tasks_blocked()
        assert not had.is_set()
        hives.may_say_hello.set()
    assert had.is_set()
    assert hives.log == ["started", "ended", "left"]


async def test_leaving_it_while_it_starts_ends_it(made: Made) -> None:
    hives, first, local = made
    async with open_service(first.keep):
        with trio.move_on_after(0.01):
            async with local.open_hive(first.start):
                pass
        assert first._over.is_set()
    assert hives.log == ["started"]


async def test_one_that_nobody_has_ends_with_its_queen(made: Made) -> None:
    hives, first, _ = made
    hives.may_say_hello.set()
    async with open_service(first.keep):
        await wait_all_tasks_blocked()
    assert hives.log == ["started", "ended"]


@pytest.mark.parametrize("when", ["error", "left"])
async def test_why_it_does_not_start_or_end_is_told_to_who_has_it(made: Made, when: str) -> None:
    hives, first, local = made
    setattr(hives, when, MachineError("no room"))
    hives.may_say_hello.set()
    async with open_service(first.keep):
        with pytest.raises(MachineError, match="no room"):
            async with local.open_hive(first.start):
                pass


async def test_who_comes_later_gets_one_of_his_own(made: Made, home: Home) -> None:
    hives, first, _ = made
    machines = Machines(first.setup, first)
    hives.may_say_hello.set()
    async with open_service(first.keep), machines.connect("localhost", told) as local:
        assert machines.begun("elsewhere") is None
        start = machines.begun("localhost")
        assert start is first.start
        async with local.open_hive(start):
            assert machines.begun("localhost") is None
        async with local.open_hive(start_of(first.setup, "")):
            pass
    assert hives.log == ["started", "ended"] * 2


def told(narration: Narration) -> None:
    """Take what happens."""
