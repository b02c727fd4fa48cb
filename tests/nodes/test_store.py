"""The registry of nodes: each call one transaction, seen by everybody at once."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rbee.errors import BadInputError, ConflictError, MachineError, NotFoundError
from rbee.home import Home
from rbee.model import node_name
from rbee.nodes.node import Node, NodeStatus, Transport
from rbee.nodes.store import NodeStore
from rbee.wire.messages import UpdateNode

MAC = Node("mac", host="mac.local", environment={"A": "ö;$(x)"}, capabilities={"cpus": 8})


@pytest.fixture
def store(home: Home) -> NodeStore:
    return NodeStore.of(home)


async def test_without_a_database_there_are_no_nodes_and_none_is_made(store: NodeStore) -> None:
    assert await store.all() == []
    with pytest.raises(NotFoundError, match="no node 'mac'; known: localhost"):
        await store.remove("mac")
    with pytest.raises(NotFoundError):
        await store.update("mac", UpdateNode(user="me"))
    assert not store.file.exists()


async def test_nodes_are_listed_by_name_whoever_added_them(store: NodeStore, home: Home) -> None:
    await store.add(MAC)
    await NodeStore.of(home).add(Node("gpu"))
    assert await store.all() == [Node("gpu"), MAC]
    assert await store.get("mac") == MAC


texts = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp", "Zs", "Cf", "Cn", "Co")))
nodes = st.builds(
    Node,
    name=st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True).map(node_name),
    port=st.none() | st.integers(1, 65535),
    user=texts.filter(str.isprintable),
    key=texts.filter(str.isprintable).map(lambda text: f"/{text} '\";"),
    environment=st.dictionaries(st.from_regex(r"[A-G_]\w{0,3}", fullmatch=True).filter(str.isascii),
                                texts),
    transport=st.sampled_from(Transport),
    status=st.sampled_from(NodeStatus),
    last_seen=st.floats(0, 2e9),
    last_error=texts,
    capabilities=st.dictionaries(texts, st.none() | st.integers(-9, 9) | texts),
)  # fmt: skip


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nodes)
def test_what_is_stored_is_read_as_it_was(store: NodeStore, node: Node) -> None:
    store.file.unlink(missing_ok=True)
    store._insert(node)
    assert store._read_all() == [node]


async def test_a_name_is_taken_once(store: NodeStore) -> None:
    await store.add(MAC)
    with pytest.raises(ConflictError, match="there is a node 'mac' already") as caught:
        await store.add(attrs.evolve(MAC, host="other"))
    assert caught.value.code == "node_exists"
    assert await store.all() == [MAC]


async def test_an_update_changes_what_is_given_and_nobody_elses_node(store: NodeStore) -> None:
    await store.add(MAC)
    await store.add(Node("gpu"))
    after = await store.update("mac", UpdateNode(transport="ssh"))
    assert after == attrs.evolve(MAC, transport=Transport.SSH)
    assert await store.all() == [Node("gpu"), after]


async def test_a_wrong_update_changes_nothing(store: NodeStore, tmp_path: Path) -> None:
    await store.add(MAC)
    with pytest.raises(BadInputError, match="port 70000"):
        await store.update("mac", UpdateNode(port=70000))
    with pytest.raises(NotFoundError, match="no key file"):
        await store.update("mac", UpdateNode(key=str(tmp_path / "gone")))
    with pytest.raises(NotFoundError, match="no node 'pc'; known: localhost, mac"):
        await store.update("pc", UpdateNode(user="me"))
    assert await store.all() == [MAC]


async def test_a_key_that_has_gone_since_is_no_reason_to_refuse_other_changes(
    store: NodeStore, tmp_path: Path
) -> None:
    await store.add(attrs.evolve(MAC, key=str(tmp_path / "gone")))
    assert (await store.update("mac", UpdateNode(user="me"))).user == "me"


@pytest.mark.parametrize("call", ["get", "remove", "update"])
async def test_localhost_is_never_touched(store: NodeStore, call: str) -> None:
    more = [UpdateNode(user="me")] if call == "update" else []
    with pytest.raises(ConflictError, match="is this machine"):
        await getattr(store, call)("localhost", *more)


async def test_a_removed_node_is_gone_and_its_name_free(store: NodeStore) -> None:
    await store.add(MAC)
    await store.remove("mac")
    with pytest.raises(NotFoundError):
        await store.get("mac")
    await store.add(MAC)


async def test_what_happens_to_a_node_is_noted(store: NodeStore) -> None:
    await store.add(MAC)
    failed = await store.note_failure("mac", "connection refused")
    assert (failed.status, failed.last_error) == (NodeStatus.UNREACHABLE, "connection refused")
    assert (await store.note_failure("mac", "no rbee", NodeStatus.UNUSABLE)).last_seen == 0
    begin = time.time()
    await store.note_ready("mac", {"cpus": 16})
    back = await store.note_ready("mac")
    assert (back.status, back.last_error, back.capabilities) == (NodeStatus.READY, "", {"cpus": 16})
    assert begin <= back.last_seen <= time.time()
    assert await store.get("mac") == back


@pytest.mark.parametrize("vllm", [None, "1.0"])
async def test_a_node_without_an_engine_is_not_ready(store: NodeStore, vllm: str | None) -> None:
    await store.add(MAC)
    node = await store.note_ready("mac", {"engines": {"vllm": vllm, "echo": "1"}})
    assert node.status is (NodeStatus.READY if vllm else NodeStatus.UNUSABLE)
    assert ("vllm is not installed" in node.last_error) is (vllm is None)


async def test_changes_made_at_once_are_all_kept(store: NodeStore) -> None:
    await store.add(MAC)
    async with trio.open_nursery() as nursery:
        for i in range(8):
            nursery.start_soon(store.update, "mac", UpdateNode(environment={f"V{i}": "1"}))
    assert len((await store.get("mac")).environment) == 9


@pytest.mark.parametrize(
    ("column", "value"),
    [("port", "many"), ("environment", "{"), ("environment", "[]"), ("status", "merry"),
     ("name", "localhost"), ("host", b"\xff"), ("transport", None)],
)  # fmt: skip
async def test_an_entry_that_rbee_did_not_write_is_told(
    store: NodeStore, column: str, value: object
) -> None:
    await store.add(MAC)
    connection = sqlite3.connect(store.file)
    if value is None:
        connection.execute("PRAGMA writable_schema = 1")
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '')")
        connection.commit()
        connection.close()
        connection = sqlite3.connect(store.file)
    connection.execute(f"UPDATE nodes SET {column} = ?", (value,))
    connection.commit()
    connection.close()
    with pytest.raises(MachineError, match=f"{store.file} is damaged: node ") as caught:
        await store.all()
    assert caught.value.hint.startswith("mv ")


async def test_a_table_without_a_column_is_told(store: NodeStore) -> None:
    await store.add(MAC)
    connection = sqlite3.connect(store.file)
    connection.execute("ALTER TABLE nodes RENAME COLUMN created TO made")
    connection.close()
    with pytest.raises(MachineError, match="is damaged: node 'mac': "):
        await store.get("mac")


async def test_the_event_loop_runs_on_while_the_database_is_waited_for(store: NodeStore) -> None:
    await store.add(MAC)
    holder = sqlite3.connect(store.file, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with trio.fail_after(2), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.note_ready, "mac")
            await trio.sleep(0.05)
            scope.cancel()  # nor does cancelling wait for it
    assert scope.cancelled_caught
    holder.execute("ROLLBACK")
    holder.close()


async def test_only_the_database_is_left_in_the_home(store: NodeStore, home: Home) -> None:
    await store.add(MAC)
    found = sorted(name for name in os.listdir(home.root) if "queen" in name)
    assert found == ["queen.db"]
