"""The hive's heartbeat: it lives, its workers, and what its node has: room, devices, models."""

from __future__ import annotations

import logging
import shutil

import attrs
import trio

from rbee.devices import devices, memory
from rbee.hive.workers import HiveSetup, Workers
from rbee.home import Home
from rbee.models.names import CatalogNames
from rbee.wire.messages import Device, Heartbeat

log = logging.getLogger(__name__)

EVERY = 5.0
LOOK = 2.0  # seconds for the disk to answer
MODELS = 2000  # names that are told: an event has an end


@attrs.frozen
class Seen:
    """What a look at the node's disk and devices has shown."""

    disk_free: int = 0
    models: tuple[str, ...] | None = None
    devices: tuple[Device, ...] = ()


class Pulse:
    """Sends a heartbeat among the workers' news, so that what it tells is in their order."""

    def __init__(self, setup: HiveSetup, workers: Workers) -> None:
        self._setup = setup
        self._workers = workers
        self._names = CatalogNames(setup.home.models)
        self._seen = Seen()
        self._looking = trio.CapacityLimiter(1)  # a home on a dead NFS holds one thread, not all

    async def keep_beating(self) -> None:
        while True:
            await self._look()
            self._workers.news.send(self.heartbeat())
            await trio.sleep(EVERY)

    def heartbeat(self) -> Heartbeat:
        total, free = memory()
        seen, workers = self._seen, tuple(self._workers.infos())
        return Heartbeat(
            self._setup.id, total, free, seen.disk_free, workers, seen.models, seen.devices
        )

    async def _look(self) -> None:
        with trio.move_on_after(LOOK) as scope:
            self._seen = await trio.to_thread.run_sync(
                _see, self._setup.home, self._names, abandon_on_cancel=True, limiter=self._looking
            )
        if scope.cancelled_caught:
            log.warning("the disk of %s does not answer", self._setup.home.root)


def _see(home: Home, names: CatalogNames) -> Seen:
    return Seen(_free(str(home.root)), names.read()[:MODELS], tuple(devices()))


def _free(path: str) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:  # somebody has removed it
        return 0
