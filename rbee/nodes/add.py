"""Adding a node: it is saved once it has been tried, never before."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs

from rbee.home import Home
from rbee.nodes.files import check_files
from rbee.nodes.node import Node
from rbee.nodes.store import NodeStore, ready, taken

Probe = Callable[[Node], Awaitable[dict[str, Any]]]
"""Connect to a node and return what `rbee-hive detect` prints there; raise `RbeeError` if not."""


async def add_node(home: Home, node: Node, probe: Probe, *, ssh_config: Path | None = None) -> Node:
    """Try a node and save it; return it as saved. Nothing is saved of one that fails.

    Raises:
        ConflictError: there is one of that name.
        NotFoundError, BadInputError, MachineError: its key file or ssh_config alias is no good.
        RbeeError: what the probe says.
    """
    store = NodeStore.of(home)
    if any(other.name == node.name for other in await store.all()):
        raise taken(node.name)  # before it is tried, which takes its time
    check_files(node, ssh_config)
    tried = ready(node, await probe(node))
    saved = attrs.evolve(tried, created=time.time())
    await store.add(saved)
    return saved
