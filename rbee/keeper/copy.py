"""``model pull --copy``: a model of this machine sent to a node, with no queen and no hub."""

from __future__ import annotations

import shlex
from functools import partial

import trio

from rbee.aio import open_aio
from rbee.config import load_config
from rbee.errors import UsageError
from rbee.home import find_home
from rbee.keeper.flags import PullFlags
from rbee.keeper.output import Output
from rbee.keeper.start import is_ours
from rbee.model import LOCALHOST, node_name
from rbee.models.child import Narrate
from rbee.models.parcel import Parcel, find_parcel, seal
from rbee.models.reference import shown
from rbee.nodes.delivery import Delivered, deliver
from rbee.nodes.node import Node
from rbee.nodes.store import NodeStore
from rbee.nodes.target import target_of
from rbee.ssh import ConnectionLostError, TransferError, open_connection
from rbee.units import human
from rbee.wire.messages import Pulled, PullModel


def check_copy(flags: PullFlags, model: str) -> None:
    """Refuse a copy to nowhere, or to another machine's node; raise `UsageError`."""
    if not is_ours(flags):
        raise UsageError(
            f"--copy sends to a node of this machine's registry; of the queen at {flags.queen_url} "
            "nothing is asked",
            hint=f"env -u RBEE_QUEEN_URL {again(model, flags.node)}",
        )
    if flags.node in (None, LOCALHOST):
        raise UsageError(
            "--copy sends a model of this machine to another one: it needs --node NAME",
            hint=f"rbee-keeper node list   # then: {again(model, 'its-name')}",
        )


async def copy_model(flags: PullFlags, request: PullModel, output: Output) -> Pulled:
    """Have a model of this machine in the catalog of the node that the request names.

    Raises:
        RbeeError: as `find_parcel`, `seal` and `deliver` do.
    """
    home, narrate = find_home(flags.home), partial(output.step, "keeper")
    node = await NodeStore.of(home).get(node_name(request.node or ""))
    aliases = load_config(home.config_file).aliases
    find = partial(find_parcel, home, request.model, aliases=aliases, dtype=request.dtype)
    parcel = await trio.to_thread.run_sync(find)
    narrate("connect", f"to {node.name} ({node.address})")
    try:
        delivered = await _send(parcel, node, narrate)
    except (ConnectionLostError, TransferError) as exc:
        exc.hint = f"{again(request.model, node.name)}   # goes on from there"
        raise
    if delivered.sent:
        narrate("fetched", f"{parcel.entry.reference} on {node.name}, {human(delivered.sent)} sent")
    return Pulled(parcel.entry.reference, delivered.directory)


def again(model: str, node: str | None) -> str:
    """Write the command that copies a model to a node."""
    words = ["rbee-keeper", "model", "pull", shown(model)]
    return shlex.join([*words, *(["--node", node] if node else []), "--copy"])


async def _send(parcel: Parcel, node: Node, narrate: Narrate) -> Delivered:
    async with (
        open_aio(name="ssh", uvloop=False) as aio,
        open_connection(target_of(node), aio) as connection,
    ):
        sealed = await seal(parcel, narrate)
        home = node.environment.get("RBEE_HOME", "")
        return await deliver(sealed, connection, narrate, home=home)
