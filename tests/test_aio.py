"""The asyncio thread: results, errors and cancellation cross it, and nothing is left behind."""

import asyncio
import threading
import time

import pytest
import trio
import trio.testing

from rbee.aio import ROOM, AioCancelledError, Bell, Outbox, open_aio


@pytest.fixture(params=[True, False], ids=["uvloop", "asyncio"])
def uvloop(request):
    return request.param


def other_tasks():
    me = asyncio.current_task()
    return [task for task in asyncio.all_tasks() if task is not me and "_main" not in repr(task)]


async def echo(value):
    await asyncio.sleep(0)
    return value


async def test_a_call_returns_the_result_or_raises_the_error(uvloop):
    async def fail():
        raise ValueError("boom")

    with trio.fail_after(5):
        async with open_aio(uvloop=uvloop) as aio:
            assert await aio.call(echo, 5) == 5
            with pytest.raises(ValueError, match="boom"):
                await aio.call(fail)


async def test_it_runs_in_one_other_thread_that_ends_with_the_body():
    async def thread():
        return threading.current_thread()

    with trio.fail_after(5):
        async with open_aio(name="side") as aio:
            first, second = await aio.call(thread), await aio.call(thread)
    assert first is second is not threading.current_thread()
    assert first.name == "side"
    first.join(5)
    assert not first.is_alive()


async def test_the_event_loop_policy_is_left_alone():
    before = asyncio.get_event_loop_policy()
    async with open_aio() as aio:
        await aio.call(echo, 1)
        assert asyncio.get_event_loop_policy() is before


async def test_cancelling_a_call_ends_the_asyncio_task_before_it_returns(uvloop):
    seen = []

    async def work():
        seen.append("began")
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            seen.append("ended")

    with trio.fail_after(5):
        async with open_aio(uvloop=uvloop) as aio:
            with trio.move_on_after(0.05):
                await aio.call(work)
            assert seen == ["began", "ended"]


async def test_a_blocked_loop_delays_a_cancelled_call_only_for_its_grace():
    gate = threading.Event()

    async def block():
        gate.wait(30)

    with trio.fail_after(10):
        async with open_aio(grace=0.1) as aio:
            start = trio.current_time()
            with trio.move_on_after(0.05):
                await aio.call(block)
            assert trio.current_time() - start < 2
    gate.set()


@pytest.mark.parametrize("steps", range(8))
async def test_cancelling_at_every_point_neither_hangs_nor_leaves_a_task(steps, uvloop):
    async def work():
        for _ in range(3):
            await asyncio.sleep(0)
        return "done"

    async def count():
        return len(other_tasks())

    async def cancel_after(scope):
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    with trio.fail_after(20):
        async with open_aio(uvloop=uvloop) as aio:
            for _ in range(30):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel_after, nursery.cancel_scope)
                    await aio.call(work)
            assert await aio.call(count) == 0


async def test_a_task_cancelled_before_its_first_step_still_reports_its_end(uvloop):
    ran = []

    async def work():
        ran.append(1)

    with trio.fail_after(5):
        async with open_aio(uvloop=uvloop) as aio:
            aio.soon(time.sleep, 0.05)  # keeps the loop from taking the first step
            task = aio.spawn(work)
            task.cancel()
            with pytest.raises(AioCancelledError):
                await task.wait()
    assert ran == []


async def test_closing_cancels_what_still_runs():
    ended = threading.Event()

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with trio.fail_after(5):
        async with open_aio() as aio:
            task = aio.spawn(work)
            await aio.call(asyncio.sleep, 0.01)
        with pytest.raises(AioCancelledError):
            await task.wait()
        with pytest.raises(AioCancelledError):
            await aio.call(work)
    assert ended.is_set()


async def test_an_outbox_keeps_the_order_and_wakes_the_reader_once_for_many():
    got, batches = [], 0

    async def produce(box):
        for item in range(1000):
            box.put(item)

    with trio.fail_after(5):
        async with open_aio() as aio:
            box = aio.outbox()
            task = aio.spawn(produce, box)
            await task.wait()
            while len(got) < 1000:
                got += await box.take()
                batches += 1
    assert got == list(range(1000))
    assert batches < 10


async def test_all_outboxes_share_one_wake_up(monkeypatch):
    wakes = []

    async def produce(boxes):
        for box in boxes:
            box.put(1)

    async with open_aio() as aio:
        boxes = [aio.outbox() for _ in range(16)]
        monkeypatch.setattr(Bell, "_wake", lambda bell, wake=Bell._wake: wakes.append(wake(bell)))
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for box in boxes:
                    nursery.start_soon(box.take)
                await trio.testing.wait_all_tasks_blocked()
                await aio.call(produce, boxes)
    assert len(wakes) < len(boxes)


async def test_a_slow_reader_holds_the_sender_back():
    async def produce(box):
        for item in range(ROOM * 4):
            await box.send(item)
        return "all sent"

    with trio.fail_after(5):
        async with open_aio() as aio:
            box = aio.outbox()
            task = aio.spawn(produce, box)
            await aio.call(asyncio.sleep, 0.05)
            got = await box.take()
            assert len(got) <= ROOM + 1
            while len(got) < ROOM * 4:
                got += await box.take()
            assert await task.wait() == "all sent"
    assert got == list(range(ROOM * 4))


def test_putting_after_trio_has_ended_is_harmless():
    async def main():
        return Outbox(Bell(trio.lowlevel.current_trio_token()))

    trio.run(main).put("late")
