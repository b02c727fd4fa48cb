"""The queen's registry of nodes over real HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from rbee.client import AsyncClient
from rbee.errors import (
    BadInputError,
    ConflictError,
    NotFoundError,
    PeerError,
    RbeeError,
    UnavailableError,
)
from rbee.home import Home
from rbee.nodes.add import Probe
from rbee.nodes.node import Node
from rbee.nodes.store import NodeStore
from rbee.queen.machine import QueenSetup
from rbee.queen.machines import Machines
from rbee.queen.nodes import add_node_routes
from rbee.web.listener import open_listener
from rbee.web.router import App
from rbee.web.server import serve_http
from rbee.wire.messages import AddNode, NodeInfo, UpdateNode
from tests.machines import make_user, open_machines, plant_detect

TOKEN = "secret"


async def answers(node: Node) -> dict[str, Any]:
    await trio.lowlevel.checkpoint()
    if node.name == "down":
        raise UnavailableError("connection refused", hint="ssh down")
    return {"cpus": 8}


@asynccontextmanager
async def open_queen(
    home: Home, probe: Probe | None = answers
) -> AsyncGenerator[AsyncClient, None]:
    app = App(token=TOKEN)
    add_node_routes(app, home, probe)
    async with trio.open_nursery() as nursery:
        listener = open_listener("127.0.0.1", 0, exact=True)
        url = await nursery.start(partial(serve_http, app, listener, grace=0.1))
        async with AsyncClient(url, TOKEN) as client:
            yield client
        nursery.cancel_scope.cancel()


async def names(client: AsyncClient) -> list[str]:
    return [node.name for node in await client.nodes()]


async def test_localhost_is_always_there_and_first(home: Home) -> None:
    async with open_queen(home) as client:
        assert await names(client) == ["localhost"]
        await NodeStore.of(home).add(Node("a"))  # somebody else's change is seen at once
        assert await names(client) == ["localhost", "a"]
        here = await client.node("localhost")
        assert here == NodeInfo("localhost", address="localhost", status="ready")
        for call in (client.remove_node, lambda name: client.update_node(name, UpdateNode())):
            with pytest.raises(ConflictError) as caught:
                await call("localhost")
            assert caught.value.code == "reserved_node"


async def test_a_node_is_added_shown_changed_and_removed(home: Home) -> None:
    async with open_queen(home) as client:
        added = await client.add_node(AddNode("mac", host="192.0.2.7", environment={"TOKEN": "t"}))
        assert (added.status, added.capabilities) == ("ready", {"cpus": 8})
        assert added.environment == {"TOKEN": "***"}
        assert await client.node("mac") == added
        changed = await client.update_node("mac", UpdateNode(host="", transport="ssh"))
        assert (changed.host, changed.transport, changed.status) == ("", "ssh", "unknown")
        assert (await NodeStore.of(home).get("mac")).environment == {"TOKEN": "t"}
        await client.remove_node("mac")
        assert await names(client) == ["localhost"]


async def test_only_a_node_that_answers_is_added(home: Home) -> None:
    async with open_queen(home) as client:
        with pytest.raises(UnavailableError, match="refused") as caught:
            await client.add_node(AddNode("down"))
        assert caught.value.hint == "ssh down"
        assert await names(client) == ["localhost"]


@pytest.mark.slow
async def test_a_queen_tries_a_node_over_ssh_of_her_own(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = Machines(QueenSetup("queen-1", home, home.run / "q1", TOKEN, "nonce"))
    with open_machines("mac") as hosts:
        user = make_user(hosts, tmp_path / "user", monkeypatch, knows=False)
        body = AddNode("mac", ssh_alias="mac", rbee_path=plant_detect(hosts["mac"], cpus=7))
        async with machines.open(), open_queen(home, machines.probe) as client:
            with pytest.raises(PeerError, match="nobody has vouched") as caught:
                await client.add_node(body)
            assert caught.value.code == "unknown_host_key"
            assert caught.value.details["fingerprint"].startswith("SHA256:")
            assert not user.known_hosts.exists()
            added = await client.add_node(attrs.evolve(body, accept_new_host_key=True))
            assert (added.status, added.capabilities["cpus"]) == ("ready", 7)
            assert user.known_hosts.exists()
            lacking = AddNode("pc", ssh_alias="mac")
            assert (await client.add_node(lacking)).status == "unusable"


async def test_nothing_can_be_added_where_nothing_can_be_tried(home: Home) -> None:
    async with open_queen(home, probe=None) as client:
        with pytest.raises(RbeeError, match="takes GET, not POST"):
            await client.add_node(AddNode("mac"))


async def test_what_is_wrong_is_told_as_it_is_by_hand(home: Home, tmp_path: Path) -> None:
    async with open_queen(home) as client:
        await client.add_node(AddNode("mac"))
        with pytest.raises(ConflictError, match="already"):
            await client.add_node(AddNode("mac"))
        with pytest.raises(BadInputError, match="not valid"):
            await client.add_node(AddNode("Mac"))
        with pytest.raises(BadInputError, match="port 70000"):
            await client.update_node("mac", UpdateNode(port=70000))
        with pytest.raises(NotFoundError, match="no key file"):
            await client.update_node("mac", UpdateNode(key=str(tmp_path / "gone")))
        for call in (client.node, client.remove_node):
            with pytest.raises(NotFoundError, match="no node 'a b'; known: localhost, mac"):
                await call("a b")


async def test_a_database_that_cannot_be_used_is_told(home: Home) -> None:
    home.queen_db.write_text("this is no database at all\n" * 9)
    async with open_queen(home) as client:
        with pytest.raises(RbeeError, match="is damaged") as caught:
            await client.nodes()
    assert caught.value.code == "database_damaged"
