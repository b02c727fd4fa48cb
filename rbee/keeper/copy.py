"""``model pull --copy``: a model of this machine sent to a node, with no queen and no hub."""

from __future__ import annotations

from functools import partial

import trio

from rbee.aio import open_aio
from rbee.config import load_config
from rbee.errors import UsageError
from rbee.home import find_home
from rbee.keeper.flags import PullFlags
from rbee.keeper.output import Output
from rbee.model import LOCALHOST, node_name
from rbee.models.child import Narrate
from rbee.models.parcel import Parcel, find_parcel, seal
from rbee.models.preflight import human
from rbee.models.reference import shown
from rbee.nodes.delivery import Delivered, deliver
from rbee.nodes.node import Node
from rbee.nodes.store import NodeStore
from rbee.nodes.target import target_of
from rbee.ssh import ConnectionLostError, TransferError, open_connection
from rbee.wire.messages import Pulled, PullModel


def check_copy(flags: PullFlags) -> None:
    """Refuse a copy to nowhere; raise `UsageError`."""
    if flags.node in (None, LOCALHOST):
        raise UsageError(
            "--copy sends a model of this machine to another one: it needs --node NAME",
            hint="rbee-keeper node list   # then rbee-keeper model pull MODEL --node NAME --copy",
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
        model = shown(request.model)
        exc.hint = (
            f"rbee-keeper model pull {model} --node {node.name} --copy   # goes on from there"
        )
        raise
    if delivered.sent:
        narrate("fetched", f"{parcel.entry.reference} on {node.name}, {human(delivered.sent)} sent")
    return Pulled(parcel.entry.reference, delivered.directory)


async def _send(parcel: Parcel, node: Node, narrate: Narrate) -> Delivered:
    async with (
        open_aio(name="ssh", uvloop=False) as aio,
        open_connection(target_of(node), aio) as connection,
    ):
        sealed = await seal(parcel, narrate)
        home = node.environment.get("RBEE_HOME", "")
        return await deliver(sealed, connection, narrate, home=home)
