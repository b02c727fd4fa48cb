"""The models of all nodes: each node's own catalog, asked for and put together."""

from __future__ import annotations

import logging
from functools import partial
from urllib.parse import quote

import attrs
import trio

from rbee.config import load_config
from rbee.errors import PeerError, RbeeError, from_wire
from rbee.home import Home
from rbee.model import LOCALHOST
from rbee.models.catalog import remove_model
from rbee.models.info import model_infos
from rbee.queen.hive import Hive
from rbee.queen.hives import Hives
from rbee.queen.where import located
from rbee.web.client import call, open_events
from rbee.web.narrated import Tell
from rbee.wire import codec, messages
from rbee.wire.messages import Error, ModelInfo, Narration, Pulled, PullModel

log = logging.getLogger(__name__)

SCAN = 30.0  # seconds for a node to look through its catalog
REMOVE = 120.0


@attrs.frozen
class Models:
    """What a queen knows of models: its own machine's disk, and what the other hives tell."""

    home: Home
    hives: Hives

    async def infos(self) -> list[ModelInfo]:
        """List the models of this machine and of every node whose hive runs and answers."""
        found: dict[str, list[ModelInfo]] = {}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_own, found)
            for info in self.hives.infos():
                if info.node != LOCALHOST and (hive := self.hives.running(info.node)):
                    nursery.start_soon(self._ask, hive, found)
        return [info for node in sorted(found) for info in found[node]]

    async def pull(self, request: PullModel, tell: Tell) -> Pulled:
        """Have a model on its node's disk; starts the node's hive if none runs.

        Raises:
            NotFoundError: there is no such node.
            RbeeError: what the hive says.
        """
        hive = await self.hives.get(request.node or LOCALHOST, tell)
        opened = open_events(hive.client, "POST", messages.HIVE_MODELS, request, what=hive.name)
        async with opened as events:
            async for name, data in events:
                if name == "narration":
                    tell(codec.loads(data, Narration))
                elif name == "pulled":
                    return codec.loads(data, Pulled)
                elif name == "error":
                    error = codec.loads(data, Error)
                    told = from_wire(
                        error.code, error.message, hint=error.hint, details=error.details
                    )
                    raise located(told, hive.info.node)
        raise PeerError(f"{hive.name} ended before the model was there", code="stream_broken")

    async def remove(self, node: str, name: str) -> None:
        """Remove a model from a node's disk; this machine's needs no hive for it."""
        if node == LOCALHOST:
            aliases = load_config(self.home.config_file).aliases
            await trio.to_thread.run_sync(partial(remove_model, self.home, name, aliases=aliases))
            return
        hive = await self.hives.get(node, lambda narration: None)
        path = f"{messages.HIVE_MODELS}/{quote(name, safe='')}"
        await call(hive.client, "DELETE", path, type(None), what=hive.name, limit=REMOVE)

    async def _read_own(self, found: dict[str, list[ModelInfo]]) -> None:
        find = partial(model_infos, self.home)
        found[LOCALHOST] = await trio.to_thread.run_sync(find, abandon_on_cancel=True)

    async def _ask(self, hive: Hive, found: dict[str, list[ModelInfo]]) -> None:
        try:
            infos = await call(
                hive.client, "GET", messages.HIVE_MODELS, list[ModelInfo], what=hive.name,
                limit=SCAN,
            )  # fmt: skip
            node = hive.info.node
            found[node] = [attrs.evolve(info, node=node) for info in infos]
        except RbeeError as exc:  # the models of one node are no reason to hide the others'
            log.warning("models of %s: %s", hive.info.node, exc)
