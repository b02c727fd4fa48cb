"""The queen's routes about the registry of nodes."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import trio

from rbee.home import Home
from rbee.model import LOCALHOST
from rbee.nodes.add import Probe, add_node
from rbee.nodes.node import new_node, refuse_localhost, this_machine, told
from rbee.nodes.store import NodeStore
from rbee.web.router import App, Request, Response, json_response
from rbee.wire import messages
from rbee.wire.messages import AddNode, UpdateNode

log = logging.getLogger(__name__)


def add_node_routes(app: App, home: Home, probe: Probe | None = None) -> None:
    """Wire the routes; nodes can be added only with a ``probe``, which tries them over SSH."""
    store = NodeStore.of(home)

    async def list_nodes(request: Request) -> Response:
        return json_response([this_machine(), *map(told, await store.all())])

    async def show_node(request: Request) -> Response:
        name = request.params["name"]
        return json_response(this_machine() if name == LOCALHOST else told(await store.get(name)))

    async def update_node(request: Request) -> Response:
        refuse_localhost(request.params["name"])
        update = await request.read(UpdateNode)
        return json_response(told(await store.update(request.params["name"], update)))

    async def remove_node(request: Request) -> Response:
        await store.remove(request.params["name"])
        return Response(status=204)

    app.add("GET", messages.QUEEN_NODES, list_nodes)
    app.add("GET", messages.QUEEN_NODES + "/{name}", show_node)
    app.add("PATCH", messages.QUEEN_NODES + "/{name}", update_node)
    app.add("DELETE", messages.QUEEN_NODES + "/{name}", remove_node)
    if probe is not None:
        _add_adding(app, home, probe)


async def _accepting(probe: Probe) -> Probe:
    """Have the probe take host keys that are unknown; one that changed stays refused."""

    async def accept(unknown: Any) -> bool:
        log.info("accepted: %s", unknown)
        return True

    # In a thread: importing takes half a second, in which no stream should stand.
    module = await trio.to_thread.run_sync(importlib.import_module, "rbee.nodes.probe")
    accepting: Probe = module.vouched(probe, accept)
    return accepting


def _add_adding(app: App, home: Home, probe: Probe) -> None:
    async def add(request: Request) -> Response:
        body = await request.read(AddNode)
        trying = await _accepting(probe) if body.accept_new_host_key else probe
        return json_response(told(await add_node(home, new_node(body), trying)), 201)

    app.add("POST", messages.QUEEN_NODES, add)
