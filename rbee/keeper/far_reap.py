"""``reap --node``: what is left on another machine, as its own `rbee-keeper reap` tells it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import trio

from rbee.aio import open_aio
from rbee.errors import RbeeError
from rbee.home import find_home
from rbee.keeper.flags import ReapFlags
from rbee.model import LOCALHOST
from rbee.nodes.node import Node
from rbee.nodes.store import NodeStore
from rbee.nodes.target import target_of
from rbee.remains import STUCK
from rbee.ssh import Completed, SshError, open_connection, run

LIMIT = 60.0  # seconds; each run directory takes two at most
TAIL = 300
# What a row has, whatever a node of another version tells.
EMPTY = dict.fromkeys(("kind", "pid", "name", "state", "memory", "path", "outcome"))


async def reap_far(flags: ReapFlags, name: str) -> tuple[list[dict[str, Any]], Sequence[RbeeError]]:
    """Have the node reap itself; return what it tells, and an error if something does not end.

    Raises:
        NotFoundError: there is no such node.
        SshError: it is not reached, has no rbee, or one that does not know how.
    """
    node = await NodeStore.of(find_home(flags.home)).get(name)
    argv = [f"{node.rbee_path}/rbee-keeper", "reap", "--node", LOCALHOST, "--json"]
    argv += ["--dry-run"] if flags.dry_run else []
    async with (
        open_aio(uvloop=False) as aio,
        open_connection(target_of(node), aio) as connection,
    ):
        with trio.move_on_after(LIMIT):
            return _read(node, await run(connection, argv, env=node.environment))
    raise SshError(
        f"node {name}: reap has not ended after {LIMIT:g} s",
        hint=connection.target.running(*argv),
        node=name,
    )


def _read(node: Node, done: Completed) -> tuple[list[dict[str, Any]], Sequence[RbeeError]]:
    why, _, hint = done.stderr.strip().removeprefix("error: ").partition("\n  hint: ")
    try:
        rows = [{**EMPTY, **row, "node": node.name} for row in json.loads(done.stdout)]
    except (ValueError, TypeError, RecursionError):
        raise SshError(
            f"node {node.name} cannot reap: {why[-TAIL:] or 'it did not say why'}",
            hint=f"rbee-keeper node install {node.name}",
            node=node.name,
        ) from None
    if not done.status:
        return rows, ()
    return rows, [RbeeError(f"node {node.name}: {why}", hint=hint, code=STUCK)]
