"""Machines to add as nodes, and the user of this one who knows how to reach them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from rbee import __version__
from rbee.testing.hosts import Host, Hosts, open_hosts_sync, why_no_hosts

TREE = Path(__file__).parents[1]
BIN = str(Path(sys.executable).parent)
DETECTED: dict[str, Any] = {
    "rbee": __version__,
    "python": "3.12.1",
    "cpus": 8,
    "disk_free": 1 << 40,
    "devices": [
        {"backend": "cpu", "index": 0, "name": "Xeon", "memory_total": 8, "memory_free": 4},
        {"backend": "cuda", "index": 0, "name": "H200", "memory_total": 8, "memory_free": 4},
    ],
    "engines": {"vllm": "0.25.1", "echo": None},
}


@contextmanager
def open_machines(*names: str) -> Iterator[Hosts]:
    if why := why_no_hosts():
        pytest.skip(why)
    with open_hosts_sync(*names, readable=[TREE]) as hosts:
        yield hosts


@attrs.frozen
class User:
    """Who sits at this machine: his ``~/.ssh``, of which rbee reads all that he did not say."""

    home: Path

    @property
    def known_hosts(self) -> Path:
        return self.home / ".ssh/known_hosts"

    @property
    def config(self) -> Path:
        return self.home / ".ssh/config"


def make_user(hosts: Hosts, home: Path, patch: pytest.MonkeyPatch, *, knows: bool = True) -> User:
    """Make a user with an ssh_config that names the hosts; he ``knows`` their keys, or none."""
    user = User(home)
    user.config.parent.mkdir(mode=0o700, parents=True)
    text = hosts.ssh_config.read_text()
    user.config.write_text(text.replace(str(hosts.known_hosts), str(user.known_hosts)))
    if knows:
        user.known_hosts.write_text(hosts.known_hosts.read_text())
    patch.setenv("HOME", str(home))
    patch.delenv("SSH_AUTH_SOCK", raising=False)
    return user


def plant(host: Host, script: str, name: str = "bin") -> str:
    """Have the host's ``rbee-hive`` be a script in a directory of its home; return that."""
    directory = host.home / name
    directory.mkdir(exist_ok=True)
    program = directory / "rbee-hive"
    program.write_text(script)
    program.chmod(0o755)
    return str(directory)


def plant_detect(host: Host, **changed: Any) -> str:
    """Have it print what a good node has, but for what is ``changed``.

    ``import`` is what it says when an engine is to be imported, and fails.
    """
    said = changed.pop("import", "")
    fails = f"[ $1 = import ] && {{ echo '{said}' >&2; exit 1; }}\n" if said else ""
    found = json.dumps(DETECTED | changed)
    return plant(host, f"#!/bin/sh\n{fails}cat <<'END'\n{found}\nEND\n")
