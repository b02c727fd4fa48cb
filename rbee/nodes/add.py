"""Adding a node: it is saved once it has been tried, never before."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs

from rbee.errors import PeerError
from rbee.home import Home
from rbee.nodes.files import check_files
from rbee.nodes.node import Node, NodeStatus
from rbee.nodes.store import NodeStore, ready, taken

Probe = Callable[[Node], Awaitable[dict[str, Any]]]
"""Connect to a node and return what `rbee-hive detect` prints there; raise `RbeeError` if not:
`NoRbeeError` if all is well but for the rbee there."""


class NoRbeeError(PeerError):
    """All is well but for the rbee there: missing, broken, another version. An install mends it."""

    code = "no_rbee"


async def add_node(home: Home, node: Node, probe: Probe, *, ssh_config: Path | None = None) -> Node:
    """Try a node and save it; return it as saved.

    One that lacks only a rbee of our version is saved as ``unusable``, because `node install` takes
    registered nodes. Nothing is saved of one that fails otherwise.

    Raises:
        ConflictError: there is one of that name.
        NotFoundError, BadInputError, MachineError: its key file or ssh_config alias is no good.
        RbeeError: what the probe says.
    """
    store = NodeStore.of(home)
    if any(other.name == node.name for other in await store.all()):
        raise taken(node.name)  # before it is tried, which takes its time
    check_files(node, ssh_config)
    saved = attrs.evolve(await _tried(node, probe), created=time.time())
    await store.add(saved)
    return saved


async def _tried(node: Node, probe: Probe) -> Node:
    try:
        return ready(node, await probe(node))
    except NoRbeeError as exc:
        return attrs.evolve(
            node, status=NodeStatus.UNUSABLE, last_error=exc.message, last_seen=time.time()
        )
