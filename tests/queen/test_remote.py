"""What a queen makes of a registered node before she starts anything there."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest

from rbee import __version__
from rbee.errors import RbeeError
from rbee.home import Home
from rbee.model import node_name
from rbee.nodes.node import Node
from rbee.queen.machine import QueenSetup
from rbee.queen.remote import RemoteMachine
from rbee.ssh import Sight
from rbee.wire.messages import DaemonStart


@pytest.mark.parametrize(
    ("program", "rbee", "code", "says"),
    [
        ("", "", "remote_program", "node mac has no ~/.rbee/venv/bin/rbee-hive"),
        ("/venv/bin/rbee-hive", "0.0.1", "other_version", f"0.0.1.*this queen is of {__version__}"),
    ],
)
async def test_a_node_without_our_rbee_starts_nothing_and_says_what_to_do(
    home: Home, program: str, rbee: str, code: str, says: str
) -> None:
    setup = QueenSetup("queen-1", home, home.run / "q1", "secret", "nonce")
    sight = Sight("/usr/bin/python3", (3, 11, 2), "/home/me/.rbee", program, rbee, None)
    there = RemoteMachine(setup, Node(node_name("mac")), None, sight, AsyncExitStack())  # type: ignore[arg-type]
    with pytest.raises(RbeeError, match=says) as caught:
        async with there.open_hive(DaemonStart("queen-1", "secret", "h1")):
            pytest.fail("there is nothing to start")
    assert caught.value.code == code
    assert caught.value.hint == "rbee-keeper node install mac"
