"""Services outlive their users; a stop signal cancels once and is swallowed after that."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.scopes import cancel_when, open_service


class Service:
    """Notes when it began and ended; ``order`` tells what came first."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    async def serve(self, *, task_status: trio.TaskStatus[str]) -> None:
        try:
            task_status.started("value")
            await trio.sleep_forever()
        finally:
            self.order.append("service")


async def use(order: list[str], cleanup: float = 0.0) -> None:
    async with open_service(Service(order).serve) as value:
        assert value == "value"
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(cleanup, shield=True):
                await trio.sleep(cleanup)
            order.append("body")


async def test_a_service_ends_after_the_body(autojump_clock: trio.abc.Clock) -> None:
    order: list[str] = []
    async with open_service(Service(order).serve) as value:
        await trio.sleep(1)
        order.append(value)
    assert order == ["value", "service"]


async def test_a_service_ends_after_the_body_also_when_cancelled_from_outside(
    autojump_clock: trio.abc.Clock,
) -> None:
    order: list[str] = []
    with trio.move_on_after(1) as scope:
        await use(order, cleanup=5)
    assert scope.cancelled_caught
    assert order == ["body", "service"]


async def test_a_service_ends_after_a_body_that_failed() -> None:
    order: list[str] = []
    with pytest.RaisesGroup(ValueError):
        async with open_service(Service(order).serve):
            order.append("body")
            raise ValueError
    assert order == ["body", "service"]


async def test_services_end_in_the_reverse_order_of_their_beginning() -> None:
    order: list[str] = []

    async def named(name: str, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            order.append(name)

    with trio.CancelScope() as scope:
        async with open_service(named, "outer"), open_service(named, "inner"):
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert order == ["inner", "outer"]


async def test_a_service_that_fails_cancels_the_body() -> None:
    async def fail(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await wait_all_tasks_blocked()
        raise ValueError("service")

    with pytest.RaisesGroup(ValueError):
        async with open_service(fail):
            await trio.sleep_forever()


async def test_a_service_that_fails_before_it_started_has_no_body() -> None:
    async def fail(*, task_status: trio.TaskStatus[None]) -> None:
        raise ValueError("service")

    with pytest.RaisesGroup(ValueError, flatten_subgroups=True):
        async with open_service(fail):
            pytest.fail("the body ran")


async def test_a_service_can_be_cancelled_while_it_starts(autojump_clock: trio.abc.Clock) -> None:
    async def never(*, task_status: trio.TaskStatus[None]) -> None:
        await trio.sleep_forever()

    with trio.move_on_after(1) as scope:
        async with open_service(never):
            pytest.fail("the body ran")
    assert scope.cancelled_caught


async def test_a_service_may_end_before_the_body() -> None:
    async def short(*, task_status: trio.TaskStatus[int]) -> None:
        task_status.started(7)

    async with open_service(short) as value:
        await wait_all_tasks_blocked()
    assert value == 7


async def test_a_scope_is_cancelled_when_what_was_waited_for_happens() -> None:
    happened, scope = trio.Event(), trio.CancelScope()
    async with trio.open_nursery() as nursery:
        await nursery.start(cancel_when, happened.wait, scope, "it happened")
        assert not scope.cancel_called
        happened.set()
        with scope:
            await trio.sleep_forever()
    assert scope.cancelled_caught


DAEMON = """
import sys
import trio
from rbee.scopes import StopReason, cancel_on_signal, open_service

async def main():
    root, reason = trio.CancelScope(), StopReason()
    async with open_service(cancel_on_signal, root, reason):
        with root:
            print("ready", flush=True)
            await trio.sleep_forever()
        print("cleaning", reason.signal, flush=True)
        sys.stdin.readline()
        await trio.lowlevel.checkpoint()
    print("done", reason.signal, flush=True)

trio.run(main)
"""


IGNORING_HUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@contextmanager
def daemon(*before: str) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    argv = [sys.executable, *before, "-c", DAEMON]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        yield child


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_stop_signal_cancels_and_the_later_ones_are_swallowed(
    first: signal.Signals,
) -> None:
    with daemon() as child:
        child.send_signal(first)
        assert child.stdout.readline() == f"cleaning {int(first)}\n"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            child.send_signal(number)
        child.stdin.write("\n")
        child.stdin.close()
        assert child.stdout.readline() == f"done {int(first)}\n"
    assert child.returncode == 0


@pytest.mark.slow
def test_a_hangup_that_was_ignored_stays_ignored() -> None:
    with daemon("-c", IGNORING_HUP) as child:
        child.send_signal(signal.SIGHUP)
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == f"cleaning {int(signal.SIGTERM)}\n"
        child.stdin.close()
        assert child.stdout.readline() == f"done {int(signal.SIGTERM)}\n"
