"""A hive says every 5 s that it lives, with its workers and the room that its node has."""

from __future__ import annotations

import pytest
import trio

from rbee.hive.pulse import Pulse
from rbee.hive.workers import HiveSetup, News, Workers
from rbee.home import Home
from rbee.testing.fakes import FakeLauncher
from rbee.wire.messages import Heartbeat, StartWorker, WorkerInfo
from tests.hive.test_workers import memory


async def nothing(*args: object) -> None:
    await trio.lowlevel.checkpoint()


def make(home: Home) -> tuple[Pulse, Workers]:
    setup = HiveSetup(id="hive-1", home=home, run_dir=home.run / "h1", token="secret")
    workers = Workers(setup, FakeLauncher(), nothing, memory=memory())
    return Pulse(setup, workers), workers


async def next_beat(news: trio.MemoryReceiveChannel[News]) -> Heartbeat:
    while not isinstance(item := await news.receive(), Heartbeat):
        pass
    return item


async def test_a_heartbeat_tells_of_workers_and_room(home: Home) -> None:
    pulse, workers = make(home)
    async with workers.open():
        info = workers.start(StartWorker("words", engine="echo"))
        with workers.news.subscribe() as news:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pulse.keep_beating)
                beat = await next_beat(news)
                nursery.cancel_scope.cancel()
        assert (beat.hive_id, beat.workers[0].worker_id) == ("hive-1", info.worker_id)
        assert 0 < beat.memory_free <= beat.memory_total
        assert beat.disk_free > 0
        assert beat.models == ()
        assert [device.backend for device in beat.devices][:1] == ["cpu"]


async def test_heartbeats_come_every_5_s_in_the_order_of_the_news(
    home: Home, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    monkeypatch.setattr(Pulse, "_look", nothing)  # no thread beside a clock that jumps
    pulse, workers = make(home)
    began = trio.current_time()
    with workers.news.subscribe() as news:
        async with workers.open(), trio.open_nursery() as nursery:
            nursery.start_soon(pulse.keep_beating)
            await trio.sleep(6)
            workers.start(StartWorker("words", engine="echo"))
            assert [len((await next_beat(news)).workers) for _ in range(2)] == [0, 0]
            assert isinstance(await news.receive(), WorkerInfo)
            assert len((await next_beat(news)).workers) == 1
            assert trio.current_time() - began == 10
            nursery.cancel_scope.cancel()
