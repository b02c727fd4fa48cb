"""Homes whose nodes are throw-away hosts, and what their users run there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import trio

from rbee.home import Home, open_home
from rbee.model import node_name
from rbee.nodes.node import Node, Transport
from rbee.nodes.store import NodeStore
from rbee.testing.hosts import Host, Hosts, open_hosts_sync, why_no_hosts
from rbee.testing.network_deaths import LEASE, client_home

TREE = Path(__file__).parents[2]
BIN = f"{sys.prefix}/bin"


@contextmanager
def open_far_hosts(*names: str) -> Iterator[Hosts]:
    """Open hosts that can read this tree, or skip the test with the reason."""
    if why := why_no_hosts():
        pytest.skip(why)
    with open_hosts_sync(*names, readable=[TREE]) as hosts:
        yield hosts


def register(home: Home, name: str, transport: Transport = Transport.DIRECT, **more: str) -> None:
    """Let a host be a node of a home."""
    node = Node(node_name(name), ssh_alias=name, transport=transport, **{"rbee_path": BIN, **more})
    trio.run(NodeStore.of(home).add, node)


@attrs.frozen
class User:
    """Somebody with a home of his own, and the environment of his commands."""

    home: Home
    environ: dict[str, str]


def user(base: Path, hosts: Hosts, nonce: str) -> User:
    """Make one who knows the hosts, with the short lease of tests."""
    environ = {
        **os.environ, "HOME": str(client_home(hosts)), "RBEE_HOME": str(base / "home"),
        "XDG_RUNTIME_DIR": str(base), "RBEE_NONCE": nonce, "SPT_NOENV": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }  # fmt: skip
    base.mkdir(exist_ok=True)
    home = open_home(base / "home", environ)
    home.config_file.write_text(f"[queen]\nlease = {LEASE:g}\nport = 0\n")
    return User(home, environ)


def end_all(host: Host) -> None:
    """End what an operator has left on a host."""
    for process in host.processes():
        process.signal()


def titles(host: Host) -> list[str]:
    """Return what rbee's processes on a host are called."""
    return sorted(one.title for one in host.processes())
