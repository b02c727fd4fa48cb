"""``node install``: puts the running rbee onto a node."""

from __future__ import annotations

import time
from typing import Any

import attrs

from rbee.aio import open_aio
from rbee.home import find_home
from rbee.keeper.flags import InstallFlags
from rbee.keeper.output import Output, note, open_output, print_facts
from rbee.nodes.install import Installed, Wanted, find_wheels, install_rbee
from rbee.nodes.node import Node
from rbee.nodes.store import NodeStore
from rbee.nodes.target import target_of
from rbee.paths import full_path
from rbee.ssh import open_connection


async def install_node(flags: InstallFlags, name: str) -> None:
    """Print what is on the node once it runs there, and note it in the registry."""
    began = time.monotonic()
    store = NodeStore.of(find_home(flags.home))
    node = await store.get(name)
    wanted = wanted_by(flags)
    find_wheels(wanted)  # before anybody waits for a network
    async with open_output() as output:
        installed = await _install(node, wanted, output)
    await store.note_ready(name, installed.capabilities)
    for venv in installed.kept:
        note(f"something still runs from {venv}; the next node install removes it if not")
    seconds = round(time.monotonic() - began, 1)
    print_facts({"node": name, **_facts(installed), "seconds": seconds}, as_json=flags.json)


def wanted_by(flags: InstallFlags) -> Wanted:
    wheelhouse = full_path(flags.wheelhouse) if flags.wheelhouse else None
    return Wanted(flags.extra or "", wheelhouse, flags.python or "", flags.force)


async def _install(node: Node, wanted: Wanted, output: Output) -> Installed:
    await output.narrate(node.name, "connect", f"to {node.address}")
    async with (
        open_aio(name="ssh", uvloop=False) as aio,
        open_connection(target_of(node), aio) as connection,
    ):
        installed = await install_rbee(connection, node, wanted, output.step)
    how = "installed" if installed.changed else "there already"
    await output.narrate(node.name, "ready", f"rbee {installed.rbee}, {how}")
    return installed


def _facts(installed: Installed) -> dict[str, Any]:
    """Return all but what `node show` tells."""
    facts = attrs.asdict(installed)
    del facts["capabilities"], facts["kept"]
    return facts
