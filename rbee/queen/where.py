"""Which machine an error is about: its hive speaks of "this machine", the user has several."""

from __future__ import annotations

import re

from rbee.errors import RbeeError
from rbee.model import LOCALHOST

_OF_A_NODE = re.compile(r"rbee-keeper (model (pull|list|show|rm)|logs)\b")


def located(error: RbeeError, node: str) -> RbeeError:
    """Have an error that a node's hive tells say which node's disk, hub or program it means."""
    if node != LOCALHOST:
        error.message = f"node {node}: {error.message}"
        error.hint = _on(node, error.hint)
    return error


def _on(node: str, hint: str) -> str:
    """Have a command be about the node: with its flag, or said to be run there."""
    command, mark, remark = hint.partition("   # ")
    if " --node " in command:
        return hint
    if _OF_A_NODE.search(command):
        return f"{command} --node {node}{mark}{remark}"
    if not command or "rbee-keeper" in command:
        return hint
    return f"{command}   # on {node}{mark and '; '}{remark}"
