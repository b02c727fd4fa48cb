"""``logs --node``: another machine's logs, as its own `rbee-keeper logs` tells them over SSH."""

from __future__ import annotations

import json
import sys

from rbee.aio import open_aio
from rbee.errors import NotFoundError
from rbee.home import find_home
from rbee.keeper.flags import LogFlags
from rbee.keeper.output import Output, note
from rbee.nodes.node import Node
from rbee.nodes.store import NodeStore
from rbee.nodes.target import target_of
from rbee.printable import printable
from rbee.ssh import RemoteProcess, Wish, open_connection, open_remote

GRACE = 2.0


async def show_far_logs(flags: LogFlags, name: str) -> None:
    """Print what the node's `rbee-keeper logs` prints, for as long as it does.

    Raises:
        NotFoundError: there is no such node, or no such log on it.
        SshError: the node is not reached, or has no rbee.
    """
    node = await NodeStore.of(find_home(flags.home)).get(name)
    async with (
        open_aio(uvloop=False) as aio,
        open_connection(target_of(node), aio) as connection,
        open_remote(connection, _wish(node, flags, connection.lease), limit=sys.maxsize) as process,
    ):
        await _print_all(process, Output(), flags)
        if await process.wait():
            raise _refused(process.channel.stderr, name, flags)
        if said := process.channel.stderr.strip():
            note(said)


def _wish(node: Node, flags: LogFlags, lease: float) -> Wish:
    argv = [f"{node.rbee_path}/rbee-keeper", "logs", "--json", "--lines", str(flags.lines)]
    argv += ["--follow"] if flags.follow else []
    argv += ["--worker", flags.worker] if flags.worker else []
    return Wish(argv, [GRACE], lease, env=node.environment, bare=True)


async def _print_all(process: RemoteProcess, output: Output, flags: LogFlags) -> None:
    rest = b""
    while more := await process.read():
        *lines, rest = (rest + more).split(b"\n")
        for line in lines:
            await output.data(_shown(line.decode("utf-8", "replace"), flags) + "\n")


def _shown(line: str, flags: LogFlags) -> str:
    if flags.json:
        return line
    try:
        told = json.loads(line)
        text = str(told["line"]) if flags.worker else f"{told['log']} | {told['line']}"
    except (
        ValueError,
        TypeError,
        KeyError,
    ):  # another program's: a login's greeting, a broken rbee
        text = line
    return printable(text)


def _refused(said: str, name: str, flags: LogFlags) -> NotFoundError:
    why, _, _ = said.strip().removeprefix("error: ").partition("\n  hint: ")
    others = f"rbee-keeper logs --node {name}" if flags.worker else f"rbee-keeper node check {name}"
    return NotFoundError(f"node {name}: {why or 'it did not say why'}", hint=others)
