"""A model runs where it can: a node that is gone costs a message, and the next one answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from rbee.home import Home
from rbee.model import node_name
from rbee.nodes.node import Node
from rbee.nodes.store import NodeStore
from rbee.testing.hosts import Hosts
from tests.cascade.far import BIN, User, open_far_hosts
from tests.cascade.keeper import infer, run
from tests.cascade.test_nodes import someone, standing_queen

pytestmark = pytest.mark.slow

MODEL = "echo?rate=200"
SHORT = ("--max-tokens", "4")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with open_far_hosts("linux") as hosts:
        yield hosts


def register(home: Home, name: str, **more: Any) -> None:
    """Let there be a node that has once said that it has the model."""
    node = Node(node_name(name), rbee_path=BIN, capabilities={"models": [MODEL]}, **more)
    trio.run(NodeStore.of(home).add, node)


def test_a_node_that_is_gone_is_told_of_and_the_next_best_answers(hosts: Hosts, nonce: str) -> None:
    with someone("me", hosts, nonce) as me:
        register(me.home, "gone", host="127.0.0.1", port=1)
        register(me.home, "linux", ssh_alias="linux")
        with standing_queen(me):
            done = infer(MODEL, *SHORT, env=me.environ)
            assert (done.code, done.out) == (0, "hello bee hello bee\n")
            (skip,) = [line for line in done.err.splitlines() if line.startswith("queen: skip")]
            assert skip.startswith("queen: skip gone: node gone: 127.0.0.1 is not reached by SSH")
            assert skip.endswith("; trying linux")
            assert explained(me) == [("linux", "warm"), ("localhost", "room"), ("gone", "no")]


def explained(me: User) -> list[tuple[str, str]]:
    """Return the nodes as they are ranked for the model."""
    done = run("worker", "start", MODEL, "--engine", "echo", "--explain", "--json", env=me.environ)
    assert done.code == 0, done.err
    return [(one["node"], one["suits"]) for one in json.loads(done.out)]
