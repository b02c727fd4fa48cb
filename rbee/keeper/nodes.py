"""``node list|show|update|remove``: the registry, read and changed with or without a queen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from rbee.errors import UsageError
from rbee.home import find_home
from rbee.keeper.flags import DataFlags, UpdateNodeFlags
from rbee.keeper.models import ago
from rbee.keeper.output import human_bytes, note, print_facts, print_json, print_rows
from rbee.model import LOCALHOST
from rbee.nodes.commands import completing, update_command
from rbee.nodes.node import this_machine, told
from rbee.nodes.store import NodeStore
from rbee.paths import full_path
from rbee.wire import codec
from rbee.wire.messages import NodeInfo, UpdateNode

COLUMNS = ("node", "status", "address", "transport", "rbee", "devices", "last_seen", "last_error")
_OF_CAPABILITIES = ("rbee", "python", "platform", "cpus")


async def list_nodes(flags: DataFlags) -> None:
    """``node list``: this machine first."""
    nodes = await _store(flags).all()
    infos = [this_machine(), *map(told, nodes)]
    if flags.json:
        print_json(codec.to_dict(infos))
    else:
        print_rows(COLUMNS, [_row(info) for info in infos], as_json=False)


async def show_node(flags: DataFlags, name: str) -> None:
    """``node show``."""
    info = this_machine() if name == LOCALHOST else told(await _store(flags).get(name))
    print_node(info, flags)


async def update_node(flags: DataFlags, name: str, update: UpdateNode) -> None:
    """``node update``: shows the node as it is now."""
    print_node(told(await _store(flags).update(name, update)), flags)


async def remove_node(flags: DataFlags, name: str) -> None:
    """``node remove``."""
    await _store(flags).remove(name)
    if flags.json:
        print_json({"node": name, "removed": True})
    else:
        note(f"removed {name}")


def node_update(flags: UpdateNodeFlags, name: str) -> UpdateNode:
    """Return what the command line gives; raise `UsageError` if that is nothing, or no sense."""
    with completing(partial(update_command, name)):
        port = None if flags.port is None else port_number(flags.port)
        environment = variables(flags.env) or None
    update = UpdateNode(
        host=flags.host,
        port=port,
        user=flags.user,
        key=flags.key and str(full_path(flags.key)),
        ssh_alias=flags.from_ssh_config,
        transport=flags.transport,
        rbee_path=flags.rbee_path,
        environment=environment,
    )
    if update == UpdateNode():
        raise UsageError("there is nothing to change", hint="rbee-keeper node update --help")
    return update


def port_number(text: str) -> int:
    """Read a port; "" is 0, which stands for the default."""
    if not text:
        return 0
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535):
        raise UsageError(f"port {text!r} is not between 1 and 65535", hint="--port 22")
    return int(text)


def variables(given: Sequence[str]) -> dict[str, str]:
    """Read ``NAME=VALUE``; raise `UsageError` for anything else."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UsageError(
                f"{text.partition('=')[0]!r} is not NAME=VALUE", hint="--env OMP_NUM_THREADS=8"
            )
        found[name] = value
    return found


def _store(flags: DataFlags) -> NodeStore:
    return NodeStore.of(find_home(flags.home))


def print_node(info: NodeInfo, flags: DataFlags) -> None:
    """Print all about a node."""
    print_facts(codec.to_dict(info) if flags.json else _facts(info), as_json=flags.json)


def _row(info: NodeInfo) -> dict[str, Any]:
    here = info.name == LOCALHOST
    return {
        "node": info.name,
        "status": info.status,
        "address": "this machine" if here else info.address,
        "transport": "" if here else info.transport,
        "rbee": info.capabilities.get("rbee"),
        "devices": devices_in_words(info.capabilities),
        "last_seen": "" if here else ago(info.last_seen),
        "last_error": info.last_error.partition("\n")[0],
    }


def _facts(info: NodeInfo) -> dict[str, Any]:
    facts = _row(info)
    for name in ("key", "rbee_path"):
        facts[name] = getattr(info, name)
    facts["environment"] = ", ".join(f"{key}={value}" for key, value in info.environment.items())
    facts["last_error"] = info.last_error
    for name in _OF_CAPABILITIES:
        facts[name] = info.capabilities.get(name)
    facts["engines"] = engines_in_words(info.capabilities)
    facts["created"] = ago(info.created) if info.created else ""
    return facts


def devices_in_words(capabilities: dict[str, Any]) -> str:
    """Return ``cpu, 2 × NVIDIA H200 (139.8 GiB)``; what is not as expected is left out."""
    found = capabilities.get("devices")
    devices = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    counts = Counter(_device(one) for one in devices)
    return ", ".join(name if n == 1 else f"{n} × {name}" for name, n in counts.items())


def _device(device: dict[str, Any]) -> str:
    total = device.get("memory_total")
    room = f" ({human_bytes(total)})" if isinstance(total, int | float) else ""
    backend = device.get("backend")
    return f"{backend if backend == 'cpu' else device.get('name', backend)}{room}"


def engines_in_words(capabilities: dict[str, Any]) -> str:
    """Return the engines that are installed, with their versions."""
    found = capabilities.get("engines")
    engines = found.items() if isinstance(found, dict) else ()
    return ", ".join(f"{name} {version}" for name, version in engines if version)
