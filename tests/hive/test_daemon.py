"""What a hive tells its queens."""

from __future__ import annotations

from typing import Any

from rbee.hive.daemon import ReadyCallbacks
from rbee.hive.owners import Owners
from rbee.hive.workers import HiveSetup
from rbee.home import Home
from rbee.wire.messages import WorkerInfo


async def test_a_worker_that_is_ready_when_its_hive_has_ended_is_news_to_nobody(
    home: Home,
) -> None:
    unneeded: Any = None
    url = "http://127.0.0.1:9"
    setup = HiveSetup(id="hive-1", home=home, run_dir=home.run, token="secret", queen_url=url)
    callbacks = ReadyCallbacks(setup, Owners(unneeded))
    async with callbacks.open():
        pass
    callbacks.send(WorkerInfo("worker-1", "echo", "ready"))
