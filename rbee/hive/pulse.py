"""The hive's heartbeat: it lives, its workers, and how much room its node has."""

from __future__ import annotations

import logging
import shutil

import trio

from rbee.hive.detect import memory
from rbee.hive.workers import HiveSetup, Workers
from rbee.wire.messages import Heartbeat

log = logging.getLogger(__name__)

EVERY = 5.0
LOOK = 2.0  # seconds for the disk to answer


class Pulse:
    """Sends a heartbeat among the workers' news, so that what it tells is in their order."""

    def __init__(self, setup: HiveSetup, workers: Workers) -> None:
        self._setup = setup
        self._workers = workers
        self._disk_free = 0
        self._looking = trio.CapacityLimiter(1)  # a home on a dead NFS holds one thread, not all

    async def keep_beating(self) -> None:
        while True:
            await self._look()
            self._workers.news.send(self.heartbeat())
            await trio.sleep(EVERY)

    def heartbeat(self) -> Heartbeat:
        total, free = memory()
        workers = tuple(self._workers.infos())
        return Heartbeat(self._setup.id, total, free, self._disk_free, workers)

    async def _look(self) -> None:
        with trio.move_on_after(LOOK) as scope:
            self._disk_free = await trio.to_thread.run_sync(
                _free, str(self._setup.home.root), abandon_on_cancel=True, limiter=self._looking
            )
        if scope.cancelled_caught:
            log.warning("the disk of %s does not answer", self._setup.home.root)


def _free(path: str) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:  # somebody has removed it
        return 0
