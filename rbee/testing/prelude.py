"""What comes before the fault of a round: the cluster it wants, brought to the round's moment."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import trio

from rbee.client import AsyncClient
from rbee.model import LOCALHOST
from rbee.testing.blows import Reach
from rbee.testing.census import SESSION
from rbee.testing.rounds import Round
from rbee.testing.scene import Scene, number_of, wanted
from rbee.testing.world import POLL, World
from rbee.wire.messages import StartWorker, WorkerInfo

STREAMS = 3
STARTED, LOADED, SWAPPED = 90, 91, 92  # numbers of workers that are not the round's own


@attrs.frozen
class Prelude:
    """Brings a world to where a round's fault is to hit it."""

    world: World
    round: Round

    @property
    def wants_new(self) -> bool:
        """Whether the cluster that there is will not do: it is to be hit while it starts."""
        return self.round.moment == "starting" and self.round.fault.aim == Reach.ALL

    @property
    def waits(self) -> bool:
        """Whether one of its nodes is fenced: a new queen does not know of it."""
        now = trio.current_time()
        return any(self.world.fenced.get(node, 0) > now for node in self.round.nodes)

    async def take_shape(self) -> None:
        """Have the hives and workers of the round, and no others."""
        if self.world.cluster is None:
            await self.world.start()
        if not self.wants_new:
            await self._populate(await self.world.connect())

    async def _populate(self, client: AsyncClient) -> None:
        fresh = {self.round.node} if self.round.moment == "starting" else set()
        nodes = set(self.round.nodes) - fresh
        async with trio.open_nursery() as nursery:
            for hive in await client.hives():
                if hive.node not in nodes:
                    nursery.start_soon(client.stop_hive, hive.node)
        missing = await self._keep_wanted(client, nodes)
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(client.start_hive, node)
            for start in missing:
                nursery.start_soon(client.start_worker, start)

    async def _keep_wanted(self, client: AsyncClient, nodes: set[str]) -> list[StartWorker]:
        """Stop the workers that the round does not want; return what starts those that it lacks."""
        missing = {
            (node, number): wanted(self.world.workload, node, number)
            for number, node in enumerate(self.round.workers)
            if node in nodes
        }
        async with trio.open_nursery() as nursery:
            for info in await client.workers():
                key = info.node, number_of(info)
                if info.state == "ready" and key in missing:
                    del missing[key]
                elif info.state != "failed":
                    nursery.start_soon(client.stop_worker, info.worker_id)
        return list(missing.values())

    async def _workers(self, node: str) -> list[WorkerInfo]:
        assert self.world.client is not None
        infos = await self.world.client.workers()
        return [info for info in infos if info.node == node and info.state == "ready"]

    def _first_seen(self, role: str, at: str) -> tuple[str, str]:
        """Return who has to be there, and where, for the fault to hit something."""
        if role and role != SESSION:
            return role, at
        if self.round.fault.aim == Reach.ALL:  # nobody has asked for a hive yet
            return "queen", LOCALHOST
        return "guard A", self.round.node

    # its moment -----------------------------------------------------------------------------------
    async def reach(self, scene: Scene, order: Callable[[], None]) -> None:
        """Bring the cluster to the round's moment; ``order`` tells it to end."""
        node, first = self.round.node, self.round.fault.blows[0]
        match self.round.moment:
            case "starting":
                if self.round.fault.aim != Reach.ALL:
                    scene.start_worker(node, STARTED)
                await self.world.until_there(*self._first_seen(first.role, first.node))
            case "loading":
                before = len(self.world.census().find("worker", node))
                scene.start_worker(node, LOADED, state="loading")
                while len(self.world.census().find("worker", node)) <= before:
                    await trio.sleep(POLL)
            case "streaming":
                await self._stream(scene)
            case "swapping":
                for info in (await self._workers(node))[:1]:
                    scene.stop_worker(info)
                scene.start_worker(node, SWAPPED)
            case "stopping":
                await self._stop(scene, order)

    async def _stream(self, scene: Scene) -> None:
        for info in await scene.client.workers():
            if info.state == "ready" and len(scene.streams) < STREAMS:
                scene.stream(info)
        while any(stream.seen < 3 and not stream.end for stream in scene.streams):
            await trio.sleep(POLL)

    async def _stop(self, scene: Scene, order: Callable[[], None]) -> None:
        """Begin to end what the fault will hit."""
        aim, node = self.round.fault.aim, self.round.node
        if aim == Reach.ALL or (aim == Reach.NOTHING and self.round.by_owner):
            order()
        elif aim in (Reach.NODE, Reach.NOTHING):
            scene.stop_hive(node)
        else:
            for info in (await self._workers(node))[:1]:
                scene.stop_worker(info)
