"""``node install`` through real sshd, from a wheelhouse made of what is installed here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from packaging.requirements import Requirement

from rbee import __version__
from rbee.aio import open_aio
from rbee.errors import InsufficientError, RbeeError
from rbee.home import Home
from rbee.keeper.app import run_line
from rbee.nodes import install
from rbee.nodes.install import Installed, Wanted, install_rbee
from rbee.nodes.installer import MARKER
from rbee.nodes.node import Node, NodeStatus
from rbee.nodes.store import NodeStore
from rbee.nodes.wheel import pack, pack_running
from rbee.ssh import SshTarget, open_connection
from rbee.testing.host import Host
from rbee.testing.hosts import Hosts, open_hosts_sync, why_no_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_no_hosts()), reason=why_no_hosts() or "-"),
]
Captured = pytest.CaptureFixture[str]
# The Python of our own venv: the wheels of the wheelhouse are for it.
PYTHON = str(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))
FULL = Node("full", ssh_alias="full")
MAC = Node("mac", ssh_alias="mac")


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheelhouse")
    for name in needed_by("rbee", set()):
        pack(distribution(name), directory)
    return directory


def needed_by(name: str, seen: set[str]) -> set[str]:
    """Return all that a distribution depends on, extras aside."""
    for requirement in map(Requirement, distribution(name).requires or ()):
        is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_wanted and requirement.name not in seen:
            seen.add(requirement.name)
            needed_by(requirement.name, seen)
    return seen


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with open_hosts_sync("mac", "full") as hosts:
        yield hosts


def target(hosts: Hosts, name: str = "mac") -> SshTarget:
    return SshTarget(name, name, config=hosts.ssh_config, agent="")


async def install_on(
    hosts: Hosts, node: Node = MAC, *, extra: str = "none", told: Any = None, **wanted: Any
) -> Installed:
    wish = Wanted(extra, python=PYTHON, **wanted)
    async with (
        open_aio(uvloop=False) as aio,
        open_connection(target(hosts, node.name), aio, lease=3.0) as there,
    ):
        return await install_rbee(there, node, wish, told or (lambda *_: None))


def plant(host: Host) -> tuple[Path, Path]:
    """Pretend an older installation and one half made; return their environments."""
    link = host.home / ".rbee/venv"
    old, half = link.parent / "venvs/0.0.1-old", link.parent / "venvs/0.0.1-half"
    host.run(["mkdir", "-p", old, half, link.parent / "wheelhouse"])
    host.run(["ln", "-s", "venvs/0.0.1-old", link])
    for venv in (old, half):
        facts = {"link": str(link), "ready": venv is old, "digest": "old", "extra": "none"}
        (venv / MARKER).write_text(json.dumps(facts))
    return old, half


def entries(host: Host) -> set[str]:
    return {name for name in os.listdir(host.home / ".rbee/venvs") if not name.startswith(".")}


def test_the_running_rbee_is_installed_once(
    hosts: Hosts, wheelhouse: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: Captured,
) -> None:  # fmt: skip
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/config").write_text(hosts.ssh_config.read_text())
    monkeypatch.setenv("HOME", str(tmp_path))
    mac = hosts["mac"]
    NodeStore.of(home)._insert(attrs.evolve(MAC, environment={"PIP_NO_INDEX": "1"}))
    old, _ = plant(mac)
    there = mac.home / ".rbee/wheelhouse"
    whole, cut, *_ = sorted(wheelhouse.iterdir())
    (there / whole.name).write_bytes(whole.read_bytes())
    inode = (there / whole.name).stat().st_ino
    (there / cut.name).write_bytes(cut.read_bytes()[:100])
    (there / "stale-1-py3-none-any.whl").touch()
    os.utime(there / "stale-1-py3-none-any.whl", (1e9, 1e9))

    line = ["node", "install", "mac", "--extra", "none", "--python", PYTHON, "--json",
            "--wheelhouse", str(wheelhouse)]  # fmt: skip
    assert run_line(line) == 0
    out, err = capfd.readouterr()
    first = json.loads(out)
    assert (first["node"], first["extra"], first["changed"]) == ("mac", "none", True)
    assert "mac: ready rbee" in err
    assert (mac.home / ".rbee/venv").resolve() == Path(first["venv"])
    assert entries(mac) == {Path(first["venv"]).name, old.name}
    assert {path.name for path in there.iterdir()} == {path.name for path in wheelhouse.iterdir()}
    assert (there / whole.name).stat().st_ino == inode  # was not copied again
    assert (there / cut.name).read_bytes() == cut.read_bytes()
    (node,) = NodeStore.of(home)._read_all()
    assert node.capabilities["rbee"] == __version__
    assert node.status is NodeStatus.UNUSABLE  # the extra none has no engine

    code = "from rbee.nodes.wheel import *; print(pack_running(Path('.')).digest)"
    python = mac.home / ".rbee/venv/bin/python"
    packed = mac.run([python, "-c", code]).stdout.strip()
    assert packed == pack_running(tmp_path).digest  # installed or in a tree: the same wheel

    assert run_line(line) == 0
    second = json.loads(capfd.readouterr().out)
    assert (second["venv"], second["changed"]) == (first["venv"], False)


async def test_cancelling_ends_all_there_and_leaves_the_old_one(hosts: Hosts) -> None:
    host = hosts["full"]
    old, half = plant(host)
    with trio.CancelScope() as scope:

        def told(actor: str, action: str, text: str, share: float | None = None) -> None:
            if action == "venv":
                scope.cancel()

        await install_on(hosts, FULL, told=told)
    assert scope.cancelled_caught
    await host.wait_empty(10)
    assert (host.home / ".rbee/venv").resolve() == old
    assert not half.exists()


async def test_a_full_disk_is_told_before_and_meanwhile(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = hosts["full"]
    if not full.can_partition:
        pytest.skip(f"no mounts of its own: {full.why_no_partition}")
    place = full.home / ".rbee"
    mount = ["mount", "-t", "tmpfs", "-o", f"size=1m,uid={full.uid},gid={full.gid}", "none", place]
    full.run(["mkdir", "-p", place])
    full.run(mount, root=True)
    with pytest.raises(InsufficientError, match="node full has not enough disk") as caught:
        await install_on(hosts, FULL)
    assert caught.value.details["available"] <= 1 << 20
    monkeypatch.setitem(install.NEEDED, "none", 0)
    with pytest.raises(RbeeError, match=r"node full: the disk is full: .*No space left"):
        await install_on(hosts, FULL)
    listed = full.run(["ls", "-A", place / "venvs"]).stdout.split()
    assert [name for name in listed if not name.startswith(".")] == []


@pytest.mark.parametrize(
    ("rbee_path", "script", "why", "hint"),
    [
        ("/usr/local/nowhere", "true", "is not the bin of a virtual environment", "--rbee-path"),
        ("~/it's/bin", 'mkdir -p "$HOME/it\'s"', "it's is not of our making", '--rbee-path ""'),
        (
            "~/link/bin",
            "ln -sfn /usr $HOME/link",
            "leads to /usr, which is not of our",
            "--rbee-path",
        ),
        ("/proc/x/bin", "true", "No such file or directory", "df -h"),
    ],
)
async def test_what_is_somebody_elses_stays(
    hosts: Hosts, rbee_path: str, script: str, why: str, hint: str
) -> None:
    hosts["mac"].run(["sh", "-c", script])
    with pytest.raises(RbeeError) as caught:
        await install_on(hosts, attrs.evolve(MAC, rbee_path=rbee_path))
    assert caught.value.message.startswith("node mac: ")
    assert why in caught.value.message
    assert hint in caught.value.hint


async def test_a_python_that_does_not_run_is_told(hosts: Hosts) -> None:
    async with open_aio(uvloop=False) as aio, open_connection(target(hosts), aio) as there:
        with pytest.raises(RbeeError, match=r"no Python 3\.11 or newer, found: /no/python"):
            await install_rbee(there, MAC, Wanted("none", python="/no/python"), print)


@pytest.mark.parametrize(
    ("line", "code", "why"),
    [
        (["pc"], 1, "no node 'pc'"),
        (["localhost"], 1, "is this machine"),
        (["mac", "--extra", "rocm"], 2, "--extra"),
        (["mac", "--wheelhouse", "/no/wheels"], 1, "wheelhouse /no/wheels cannot be read: No such"),
        (["mac", "--wheelhouse", "."], 1, "has no *.whl"),
    ],
)
def test_what_is_wrong_here_is_told_before_the_node_is_asked(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured,
    line: list[str], code: int, why: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    NodeStore.of(home)._insert(attrs.evolve(MAC, ssh_alias="", host="192.0.2.7"))
    assert run_line(["node", "install", *line]) == code
    out, err = capfd.readouterr()
    assert why in err
    assert "hint: " in err
    assert out == ""
