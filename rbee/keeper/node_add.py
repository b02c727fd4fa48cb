"""``node add``: a machine is tried over SSH, with or without a queen, and registered."""

from __future__ import annotations

import sys
from functools import partial

import attrs

from rbee.aio import open_aio
from rbee.home import open_home
from rbee.keeper.flags import AddNodeFlags
from rbee.keeper.nodes import port_number, print_node, variables
from rbee.keeper.output import Output, is_terminal, note, open_output, write
from rbee.model import node_name
from rbee.nodes.add import add_node as try_and_save
from rbee.nodes.commands import add_command, completing
from rbee.nodes.node import Node, NodeStatus, new_node, told
from rbee.nodes.probe import Vouch, probe_node, vouched
from rbee.paths import full_path
from rbee.ssh import UnknownHostKeyError
from rbee.wire.messages import AddNode


def body_of(flags: AddNodeFlags, name: str) -> AddNode:
    """Return what the command line gives; raise `UsageError` if that is no sense."""
    body = AddNode(
        node_name(name),
        host=flags.host or "",
        user=flags.user or "",
        key=str(full_path(flags.key)) if flags.key else "",
        ssh_alias=flags.from_ssh_config or "",
        rbee_path=flags.rbee_path or "",
        transport=flags.transport or "",
        accept_new_host_key=flags.accept_new_host_key,
    )
    with completing(partial(add_command, body)):
        port = port_number(flags.port or "") or None
        return attrs.evolve(body, port=port, environment=variables(flags.env))


async def add_node(flags: AddNodeFlags, body: AddNode) -> None:
    """``node add``: shows the node as it was saved, also one that `node install` has to mend."""
    node, home = new_node(body), open_home(flags.home)
    async with open_output() as output, open_aio(name="ssh", uvloop=False) as aio:
        probe = partial(probe_node, aio=aio, narrate=partial(output.step, "keeper"))
        saved = await try_and_save(home, node, vouched(probe, _voucher(body, output)))
        await output.tell(f"saved {saved.name} ({saved.status.value})")
    print_node(told(saved), flags)
    _tell_what_is_left(saved)


def _tell_what_is_left(node: Node) -> None:
    if node.status is NodeStatus.UNUSABLE:
        note(f"no hive can run there yet: {node.last_error}")
        note(f"  hint: rbee-keeper node install {node.name}")


# host keys ----------------------------------------------------------------------------------------
def _voucher(body: AddNode, output: Output) -> Vouch:
    """Have the flag or whoever sits at the terminal say whether a host key is the right one."""

    async def vouch(unknown: UnknownHostKeyError) -> bool:
        key = f"the host key of {unknown.key.host}: {unknown.key.fingerprint}"
        if body.accept_new_host_key:
            await output.tell(f"accepted {key}, now in {unknown.file}")
            return True
        again = add_command(body, "--accept-new-host-key")
        unknown.hint = f"{again}   # if that is its fingerprint"
        if not is_terminal(sys.stdin):
            return False
        await output.tell(f"nobody has vouched yet for {key}")
        await output.tell(f"to compare, on that machine: ssh-keygen -lf {unknown.key.usual_file}")
        return await _confirmed("Is it the right one? [y/N] ")

    return vouch


async def _confirmed(question: str) -> bool:
    from rbee.keeper.chat import Lines

    await write(2, question.encode())
    answer = await Lines(0).next()
    return (answer or "").strip().lower() in ("y", "yes")
