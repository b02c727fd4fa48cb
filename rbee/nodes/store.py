"""The registry of nodes: every call is one transaction on `queen.db`, in a thread.

It holds nothing in memory, so the keeper and the queen see each other's changes at once. SQLite
may wait (for a lock, for NFS), which trio's loop must not. A call that is cancelled leaves its
thread to finish by itself: its change is made wholly or not at all.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import attrs
import trio

from rbee.errors import BadInputError, ConflictError, NotFoundError
from rbee.home import Home
from rbee.model import DEFAULT_ENGINE, LOCALHOST
from rbee.nodes.database import damaged, open_to_read, open_to_write
from rbee.nodes.files import check_files
from rbee.nodes.node import Node, NodeStatus, changed, refuse_localhost
from rbee.wire import codec
from rbee.wire.messages import UpdateNode

T = TypeVar("T")
TESTS = "echo"  # the engine that needs no model, and is wherever rbee is
FIELDS = tuple(field.name for field in attrs.fields(Node))
JSON_FIELDS = ("environment", "capabilities")
_INSERT = f"INSERT INTO nodes ({', '.join(FIELDS)}) VALUES ({', '.join('?' * len(FIELDS))})"
_UPDATE = f"UPDATE nodes SET {', '.join(f'{name} = ?' for name in FIELDS)} WHERE name = ?"


@attrs.frozen
class NodeStore:
    """The nodes of one home.

    Calls raise `MachineError` when the database cannot be used, `UnavailableError` when another
    process holds it for too long.
    """

    file: Path

    @classmethod
    def of(cls, home: Home) -> NodeStore:
        return cls(home.queen_db)

    async def all(self) -> list[Node]:
        """Return the registered nodes by name; none if there is no database, which makes none."""
        return await _in_thread(self._read_all)

    async def get(self, name: str) -> Node:
        """Return one node; raise `NotFoundError` if there is none of that name."""
        return await _in_thread(self._read_one, name)

    async def add(self, node: Node) -> None:
        """Add a node; raise `ConflictError` if there is one of that name."""
        await _in_thread(self._insert, node)

    async def update(self, name: str, update: UpdateNode) -> Node:
        """Change what ``update`` gives and return the node.

        Raises:
            NotFoundError: there is none of that name.
            RbeeError: what is given is wrong; nothing is changed then.
        """
        return await self.change(name, lambda node: _checked(node, changed(node, update)))

    async def change(self, name: str, change: Callable[[Node], Node]) -> Node:
        """Replace a node by ``change(node)``, which nobody else's change comes between.

        It is called in a thread and keeps the name.

        Raises:
            NotFoundError: there is none of that name.
        """
        return await _in_thread(self._replace, name, change)

    async def note_ready(self, name: str, capabilities: Mapping[str, Any] | None = None) -> Node:
        """Note that a node answered, and what it said that it has.

        For when that changes, not for each sign of life: every call writes to the disk.
        """
        return await self.change(name, partial(ready, capabilities=capabilities))

    async def note_failure(
        self, name: str, error: str, status: NodeStatus = NodeStatus.UNREACHABLE
    ) -> Node:
        """Note why a node cannot be used."""
        return await self.change(
            name, lambda node: attrs.evolve(node, status=status, last_error=error)
        )

    async def remove(self, name: str) -> None:
        """Forget a node; raise `NotFoundError` if there is none of that name."""
        await _in_thread(self._delete, name)

    # in the thread ---------------------------------------------------------------------------
    def _read_all(self) -> list[Node]:
        with open_to_read(self.file) as database:
            return self._nodes(database) if database else []

    def _read_one(self, name: str) -> Node:
        refuse_localhost(name)
        with open_to_read(self.file) as database:
            return self._one(database, name)

    def _insert(self, node: Node) -> None:
        with open_to_write(self.file) as database:
            if _row(database, node.name):
                raise taken(node.name)
            database.execute(_INSERT, _values(node))

    def _replace(self, name: str, change: Callable[[Node], Node]) -> Node:
        refuse_localhost(name)
        self._read_one(name)  # what is not there is no reason to make a database
        with open_to_write(self.file) as database:
            node = self._one(database, name)
            after = change(node)
            if after != node:
                database.execute(_UPDATE, (*_values(after), name))
            return after

    def _delete(self, name: str) -> None:
        self._read_one(name)
        with open_to_write(self.file) as database:
            self._one(database, name)
            database.execute("DELETE FROM nodes WHERE name = ?", (name,))

    def _one(self, database: sqlite3.Connection | None, name: str) -> Node:
        row = _row(database, name) if database else None
        if row is None:
            raise unknown(name, [node.name for node in self._nodes(database)] if database else [])
        return self._node(row)

    def _nodes(self, database: sqlite3.Connection) -> list[Node]:
        return [self._node(row) for row in database.execute("SELECT * FROM nodes ORDER BY name")]

    def _node(self, row: sqlite3.Row) -> Node:
        try:
            values = {name: row[name] for name in FIELDS}
            for name in JSON_FIELDS:
                values[name] = json.loads(values[name])
            return codec.structure(values, Node)
        # IndexError: a column is not there
        except (BadInputError, ConflictError, ValueError, TypeError, IndexError) as exc:
            raise damaged(self.file, f"node {dict(row).get('name')!r}: {exc}") from exc


def _checked(before: Node, after: Node) -> Node:
    """Refuse files that are no good, unless they were registered before: they may come back."""
    if (before.key, before.ssh_alias) != (after.key, after.ssh_alias):
        check_files(after)
    return after


def ready(node: Node, capabilities: Mapping[str, Any] | None = None) -> Node:
    """Return a node that has just answered; it is no good without an engine to run models."""
    found = node.capabilities if capabilities is None else dict(capabilities)
    lacks = lacks_engine(node.name, found)
    status = NodeStatus.UNUSABLE if lacks else NodeStatus.READY
    return attrs.evolve(
        node, status=status, last_error=lacks, last_seen=time.time(), capabilities=found
    )


def lacks_engine(name: str, capabilities: Mapping[str, Any]) -> str:
    """Say that a node has no engine but the one for tests; "" if it has one, or has not said."""
    engines = capabilities.get("engines")
    if not isinstance(engines, Mapping) or any(engines[one] for one in engines if one != TESTS):
        return ""
    return f"{DEFAULT_ENGINE} is not installed beside the rbee of node {name}"


def taken(name: str) -> ConflictError:
    return ConflictError(
        f"there is a node {name!r} already",
        code="node_exists",
        hint=f"rbee-keeper node show {name}   # node update changes it",
    )


def unknown(name: str, known: list[str]) -> NotFoundError:
    return NotFoundError(
        f"no node {name!r}; known: {', '.join([LOCALHOST, *known])}",
        code="unknown_node",
        hint="rbee-keeper node list",
    )


def _row(database: sqlite3.Connection, name: str) -> sqlite3.Row | None:
    found: sqlite3.Row | None = database.execute(
        "SELECT * FROM nodes WHERE name = ?", (name,)
    ).fetchone()
    return found


def _values(node: Node) -> tuple[Any, ...]:
    plain = codec.to_dict(node)
    return tuple(json.dumps(plain[name]) if name in JSON_FIELDS else plain[name] for name in FIELDS)


async def _in_thread(function: Callable[..., T], *args: Any) -> T:
    return await trio.to_thread.run_sync(partial(function, *args), abandon_on_cancel=True)
