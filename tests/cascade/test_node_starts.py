"""Hives that start on several nodes at once, and what comes there before a model can answer."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rbee.testing.host import Host
from rbee.testing.hosts import Hosts
from rbee.testing.hub_server import HubServer, read_repo
from rbee.testing.tiny_model import write_tiny_model
from tests.cascade.far import BIN, User, end_all, open_far_hosts, register, titles
from tests.cascade.keeper import COMMAND, infer, run, running_infer
from tests.cascade.test_nodes import someone, standing_queen, wait_for
from tests.machines import plant
from tests.terminal import open_terminal

pytestmark = pytest.mark.slow

MODEL = "echo?rate=200"
SHORT = ("--max-tokens", "4")
MIB = 1 << 20


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with open_far_hosts("mac", "linux") as hosts:
        yield hosts


@pytest.fixture
def nodes(hosts: Hosts) -> Iterator[tuple[Host, Host]]:
    """Two hosts whose networks can be spoilt; they are mended afterwards."""
    both = hosts["mac"], hosts["linux"]
    if why := both[0].why_no_partition:
        pytest.skip(why)
    yield both
    for host in both:
        host.heal()
        end_all(host)


@pytest.fixture
def me(hosts: Hosts, nonce: str) -> Iterator[User]:
    with someone("me", hosts, nonce) as me:
        for name in hosts:
            register(me.home, name)
        yield me


# several at once --------------------------------------------------------------------------------
def test_a_hive_starts_while_another_is_starting(hosts: Hosts, nonce: str) -> None:
    slow, quick = hosts["mac"], hosts["linux"]
    with someone("me", hosts, nonce) as me:
        register(me.home, slow.name, rbee_path=gated(slow))
        register(me.home, quick.name)
        line = (MODEL, "--node", slow.name, *SHORT)
        with standing_queen(me), running_infer(*line, env=me.environ) as starting:
            wait_for(lambda: titles(slow).count("rbee-guard") == 2, 30)
            done = infer(MODEL, "--node", quick.name, *SHORT, env=me.environ)
            assert (done.code, done.out) == (0, "hello bee hello bee\n"), done.err
            assert starting.popen.poll() is None
            (slow.home / "gate").touch()
            assert starting.end().out == "hello bee hello bee\n"


def gated(host: Host) -> str:
    """Have the host's hive wait for a file in its home before it begins."""
    script = (
        f'[ "$1" = daemon ] && until [ -e ~/gate ]; do sleep 0.02; done\nexec {BIN}/rbee-hive "$@"'
    )
    return plant(host, f"#!/bin/sh\n{script}\n", "gated")


def test_a_node_that_is_lost_while_its_hive_starts_is_used_all_the_same(
    hosts: Hosts, nonce: str
) -> None:
    mac = hosts["mac"]
    (mac.home / "gate").unlink(missing_ok=True)
    with someone("me", hosts, nonce) as me:
        register(me.home, mac.name, rbee_path=gated(mac))
        line = (MODEL, "--node", mac.name, *SHORT)
        with standing_queen(me), running_infer(*line, env=me.environ) as starting:
            wait_for(lambda: titles(mac).count("rbee-guard") == 2, 30)
            mac.kill_sessions()
            (mac.home / "gate").touch()
            done = starting.end()
            assert (done.code, done.out) == (0, "hello bee hello bee\n"), done.err
            assert "connect once more, since the connection to node mac is lost" in done.err
            assert "until nothing of the hive that was lost on mac can be left" in done.err


def test_a_dead_node_holds_up_no_other(me: User, nodes: tuple[Host, Host]) -> None:
    dead, alive = nodes
    dead.partition()
    with (
        standing_queen(me),
        running_infer(MODEL, "--node", dead.name, *SHORT, env=me.environ) as waiting,
    ):
        done = infer(MODEL, "--node", alive.name, *SHORT, env=me.environ)
        assert (done.code, done.out) == (0, "hello bee hello bee\n"), done.err
        assert waiting.popen.poll() is None  # it is tried still
        dead.heal()
        assert waiting.end().out == "hello bee hello bee\n"  # one of the tries came through


# the disk of a node -----------------------------------------------------------------------------
@contextmanager
def small_disk(host: Host, size: int) -> Iterator[Path]:
    """Have the home of rbee on a host be a disk of its own, for few files."""
    place = host.home / ".rbee"
    host.run(["mkdir", "-p", place])
    options = f"size={size},nr_inodes=200,uid={host.uid},gid={host.gid}"
    host.run(["mount", "-t", "tmpfs", "-o", options, "none", place], root=True)
    try:
        yield place
    finally:
        host.run(["umount", "--lazy", place], root=True)


def fill(host: Host, place: Path) -> None:
    """Take all blocks of a disk, and all its names."""
    host.run(["dd", "if=/dev/zero", f"of={place}/filler", "bs=4k"], check=False)
    names = "mkdir full && while mkdir full/$((n = n + 1)); do :; done"
    host.run(["sh", "-c", f"cd {place} && {names}"], check=False)


def test_a_hive_that_finds_the_disk_full_says_so(me: User, nodes: tuple[Host, Host]) -> None:
    mac, _ = nodes
    with small_disk(mac, MIB) as place:
        environment = f"RBEE_HOME={place}/rbee", f"XDG_RUNTIME_DIR={place}"
        update = ("node", "update", "mac", *(f"--env={pair}" for pair in environment))
        assert run(*update, env=me.environ).code == 0
        fill(mac, place)
        mac.run(
            [
                "sh",
                "-c",
                f"mkdir {place}/full && while mkdir {place}/full/$((n = n + 1)); do :; done",
            ],
            check=False,
        )
        done = infer(MODEL, "--node", "mac", *SHORT, env=me.environ)
        done.check_refusal("node mac", "No space left on device", "df -h")
        assert mac.processes() == []
        assert mac.run(["ls", "-A", place]).stdout.split() == ["filler", "full"]


def test_a_disk_that_fills_up_under_a_copy_is_told(me: User, nodes: tuple[Host, Host]) -> None:
    mac, _ = nodes
    model = write_large_model(me.home.root / "own/large")
    with small_disk(mac, 100 * MIB) as place:
        watching = threading.Thread(target=fill_once_something_comes, args=(mac, place))
        watching.start()
        done = run("model", "pull", str(model), "--copy", "--node", "mac", env=me.environ)
        watching.join()
        done.check_refusal("not enough disk", "on node mac: needed", "free 0 B at")
        assert mac.processes() == []
        mac.run(["rm", "-r", f"{place}/filler", f"{place}/full"])
        done = run("model", "pull", str(model), "--copy", "--node", "mac", env=me.environ)
        assert done.code == 0, done.err


def fill_once_something_comes(host: Host, place: Path) -> None:
    """Take the rest of the disk when the first bytes of a model are there."""
    see = f"until find {place} -name '*.safetensors*' -size +1M | grep -q .; do sleep 0.01; done"
    host.run(["timeout", "30", "sh", "-c", see])
    fill(host, place)


def write_large_model(directory: Path) -> Path:
    write_tiny_model(directory)
    weights = directory / "model.safetensors"
    padding = {"padding": np.zeros(24 * MIB, dtype=np.uint8)}
    save_file(load_file(weights) | padding, weights)
    return directory


# downloads --------------------------------------------------------------------------------------
def test_the_download_of_a_node_is_told_while_it_runs(
    me: User, hosts: Hosts, tmp_path: Path
) -> None:
    large = read_repo(write_large_model(tmp_path / "large"))
    hub = HubServer({"org/large": large}, pace=0.1)
    environ = me.environ | {"TERM": "xterm", "NO_COLOR": "1"}
    argv = [*COMMAND, "model", "pull", "hf:org/large", "--node", "mac"]
    with standing_queen(me), hub.serve(host=hosts.address), open_terminal() as terminal:
        environ["HF_ENDPOINT"] = hub.url
        done = subprocess.run(argv, env=environ, stdout=subprocess.PIPE, stderr=terminal.fd)
    assert done.returncode == 0, terminal.text
    assert Path(done.stdout.decode().strip()).parent == hosts["mac"].home / ".rbee/models"
    shares = [int(share) for share in re.findall(r"hive: download.*?(\d+) %", terminal.text)]
    assert len([share for share in shares if 0 < share < 100]) >= 3, terminal.text
    assert shares == sorted(shares)
