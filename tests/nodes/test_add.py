"""A node is saved once it has been tried."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from rbee.errors import BadInputError, ConflictError, NotFoundError, UnavailableError
from rbee.home import Home
from rbee.nodes.add import add_node
from rbee.nodes.node import Node, NodeStatus
from rbee.nodes.store import NodeStore

MAC = Node("mac")


@attrs.define
class FakeProbe:
    """Notes which nodes are tried."""

    error: Exception | None = None
    tried: list[Node] = attrs.field(factory=list)

    async def __call__(self, node: Node) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        self.tried.append(node)
        if self.error:
            raise self.error
        return {"cpus": 8}


async def test_a_node_that_answers_is_saved_with_what_it_has(home: Home) -> None:
    begin, probe = time.time(), FakeProbe()
    saved = await add_node(home, MAC, probe)
    assert probe.tried == [MAC]
    assert (saved.status, saved.capabilities) == (NodeStatus.READY, {"cpus": 8})
    assert begin <= saved.last_seen <= saved.created <= time.time()
    assert await NodeStore.of(home).all() == [saved]


async def test_nothing_is_kept_of_a_node_that_does_not_answer(home: Home) -> None:
    probe = FakeProbe(UnavailableError("connection refused"))
    with pytest.raises(UnavailableError, match="refused"):
        await add_node(home, MAC, probe)
    assert not home.queen_db.exists()


async def test_a_name_that_is_taken_is_refused_before_it_is_tried(home: Home) -> None:
    await NodeStore.of(home).add(MAC)
    probe = FakeProbe()
    with pytest.raises(ConflictError, match="already"):
        await add_node(home, attrs.evolve(MAC, host="other"), probe)
    assert probe.tried == []


async def test_files_are_checked_before_it_is_tried(home: Home, tmp_path: Path) -> None:
    probe, key = FakeProbe(), tmp_path / "id"
    with pytest.raises(NotFoundError, match="no key file"):
        await add_node(home, attrs.evolve(MAC, key=str(key)), probe)
    key.write_text("-----BEGIN")
    key.chmod(0o644)
    with pytest.raises(BadInputError, match="read by others"):
        await add_node(home, attrs.evolve(MAC, key=str(key)), probe)
    with pytest.raises(NotFoundError, match="has no host 'gpu'"):
        await add_node(home, attrs.evolve(MAC, ssh_alias="gpu"), probe, ssh_config=tmp_path / "c")
    assert probe.tried == []


async def test_of_two_who_add_the_same_name_one_is_refused(home: Home) -> None:
    store = NodeStore.of(home)

    async def slower(node: Node) -> dict[str, Any]:
        await store.add(attrs.evolve(node, host="first"))
        return {}

    with pytest.raises(ConflictError, match="already"):
        await add_node(home, MAC, slower)
    assert [node.host for node in await store.all()] == ["first"]
