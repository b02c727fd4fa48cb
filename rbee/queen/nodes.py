"""The queen's routes about the registry of nodes."""

from __future__ import annotations

from rbee.home import Home
from rbee.model import LOCALHOST
from rbee.nodes.add import Probe, add_node
from rbee.nodes.node import new_node, refuse_localhost, this_machine, told
from rbee.nodes.store import NodeStore
from rbee.web.router import App, Request, Response, json_response
from rbee.wire import messages
from rbee.wire.messages import AddNode, UpdateNode


def add_node_routes(app: App, home: Home, probe: Probe | None = None) -> None:
    """Wire the routes; nodes can be added only with a ``probe``, which tries them."""
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


def _add_adding(app: App, home: Home, probe: Probe) -> None:
    async def add(request: Request) -> Response:
        node = new_node(await request.read(AddNode))
        return json_response(told(await add_node(home, node, probe)), 201)

    app.add("POST", messages.QUEEN_NODES, add)
