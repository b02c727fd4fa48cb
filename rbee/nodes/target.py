"""How SSH reaches a registered node."""

from __future__ import annotations

from pathlib import Path

from rbee.nodes.node import Node
from rbee.ssh.target import SshTarget


def target_of(node: Node) -> SshTarget:
    """Return the node as an SSH client sees it: an alias of ssh_config, or host, user and key.

    Raises:
        BadInputError: host or user have what SSH gives to no shell.
    """
    if node.ssh_alias:
        return SshTarget(node.name, node.ssh_alias)
    return SshTarget(
        node.name,
        node.host or node.name,
        port=node.port,
        user=node.user or None,
        keys=(Path(node.key),) if node.key else (),
    )
