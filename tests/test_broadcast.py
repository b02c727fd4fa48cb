"""Each reader gets all that was sent while he listened, or is cut off."""

from __future__ import annotations

import pytest
import trio

from rbee.broadcast import BEHIND, Broadcast


async def take(receiver: trio.MemoryReceiveChannel[int]) -> list[int]:
    return [item async for item in receiver]


async def test_every_reader_gets_what_is_sent_while_he_listens() -> None:
    news: Broadcast[int] = Broadcast()
    news.send(0)
    with news.subscribe() as one:
        news.send(1)
        with news.subscribe() as two:
            news.send(2)
            assert [await one.receive(), await one.receive(), await two.receive()] == [1, 2, 2]
        news.send(3)
        assert await one.receive() == 3
    news.send(4)


async def test_a_reader_who_falls_behind_is_cut_off_after_what_he_has() -> None:
    news: Broadcast[int] = Broadcast()
    with news.subscribe() as slow, news.subscribe() as quick:
        for number in range(BEHIND):
            news.send(number)
            assert await quick.receive() == number
        news.send(BEHIND)
        news.send(BEHIND + 1)
        assert await take(slow) == list(range(BEHIND))
        assert [await quick.receive(), await quick.receive()] == [BEHIND, BEHIND + 1]


async def test_a_reader_who_closed_does_no_harm() -> None:
    news: Broadcast[int] = Broadcast()
    with news.subscribe() as one, news.subscribe() as two:
        one.close()
        news.send(1)
        assert await two.receive() == 1
    with pytest.raises(trio.ClosedResourceError):
        await two.receive()


async def test_a_reader_may_leave_while_another_waits() -> None:
    news: Broadcast[int] = Broadcast()

    async def listen(task_status: trio.TaskStatus[None]) -> None:
        with news.subscribe() as receiver:
            task_status.started()
            assert await receiver.receive() == 1

    async with trio.open_nursery() as nursery:
        with news.subscribe():
            await nursery.start(listen)
        news.send(1)
