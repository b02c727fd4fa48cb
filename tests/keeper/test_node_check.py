"""``node check``: what a node needs, step by step, over a real sshd."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from rbee import __version__
from rbee.home import Home
from rbee.keeper.app import run_line
from rbee.nodes import check as module
from rbee.nodes import way
from rbee.nodes.check import STEPS
from rbee.nodes.node import Node, NodeStatus, Transport
from rbee.nodes.store import NodeStore
from rbee.testing.hosts import Host, Hosts
from tests.machines import BIN, DETECTED, make_user, open_machines, plant_detect
from tests.ssh.sshd import SSHD, keygen, open_sshd

pytestmark = pytest.mark.slow

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with open_machines("mac") as hosts:
        yield hosts


@pytest.fixture
def mac(hosts: Hosts, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    make_user(hosts, tmp_path / "user", monkeypatch)
    return hosts["mac"]


def register(home: Home, **given: Any) -> NodeStore:
    store = NodeStore.of(home)
    store._insert(attrs.evolve(Node("mac", ssh_alias="mac"), **given))
    return store


def check(capfd: Captured, code: int, name: str = "mac") -> dict[str, Any]:
    """Return what ``--json`` tells, with the steps by name, in their order."""
    assert run_line(["node", "check", name, "--json"]) == code
    out, err = capfd.readouterr()
    told: dict[str, Any] = json.loads(out)
    if code:
        assert err == f"error: {told['error']}\n  hint: {told['hint']}\n"
    assert [step["name"] for step in told["steps"]] == list(STEPS)
    told["steps"] = {step["name"]: step for step in told["steps"]}
    return told


def outcomes(told: dict[str, Any], outcome: str) -> list[str]:
    return [name for name, step in told["steps"].items() if step["outcome"] == outcome]


def test_a_good_node_passes_every_step_and_is_noted_as_ready(
    mac: Host, home: Home, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEFAULT_ENGINE", "echo")  # importing vLLM twice takes 15 s each
    store = register(home, rbee_path=BIN, status=NodeStatus.UNREACHABLE, last_error="refused")
    here = check(capfd, 0, "localhost")
    told = check(capfd, 0)
    assert outcomes(told, "ok") == list(STEPS)
    for step, text in (
        ("reachable", f"{mac.address} port {mac.port}"), ("auth", f"as {mac.user}"),
        ("python", "/python"), ("latency", " ms, median of "), ("rbee", __version__),
        ("engine", "vllm "), ("disk", " free"), ("memory", " CPUs"),
    ):  # fmt: skip
        assert text in told["steps"][step]["text"]
    (node,) = store._read_all()
    assert (node.status, node.last_error) == (NodeStatus.READY, "")
    assert node.capabilities == told["capabilities"]
    assert mac.processes() == []
    assert outcomes(here, "skipped") == list(STEPS[:6])  # no SSH leads to this machine
    assert here["steps"]["engine"]["text"] == told["steps"]["engine"]["text"]


def test_steps_are_lines_for_people(mac: Host, home: Home, capfd: Captured) -> None:
    register(home, rbee_path=plant_detect(mac), transport=Transport.SSH)
    assert run_line(["node", "check", "mac"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    assert list(lines) == list(STEPS)
    assert lines["port"] == "skipped"
    assert lines["latency"].startswith("ok")
    assert "through SSH" in lines["latency"]
    assert "H200, 4 B free" in lines["gpu"]


def test_a_firewall_blocks_direct_and_not_ssh(
    mac: Host, home: Home, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not mac.can_partition:
        pytest.skip(mac.why_no_partition)
    blocked = "pref 5 iif eth0 ipproto tcp dport 9200 blackhole"
    for rule in ("add pref 10 lookup local", f"add {blocked}", "del pref 0"):
        mac.run(["ip", "rule", *rule.split()], root=True)
    store = register(home, rbee_path=plant_detect(mac))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(way, "REACH", 0.5)
            told = check(capfd, 1)
        assert run_line(told["hint"].split()[1:]) == 0
        capfd.readouterr()
        assert outcomes(check(capfd, 0), "skipped") == ["port"]
    finally:
        mac.run(["ip", "rule", "del", *blocked.split()], root=True)
    assert "port 9200 of node mac is not reached from here: no answer" in told["error"]
    assert told["hint"] == "rbee-keeper node update mac --transport ssh"
    assert (outcomes(told, "failed"), outcomes(told, "skipped")) == (["port"], ["latency"])
    assert [node.status.value for node in store._read_all()] == ["ready"]


def test_a_node_that_is_not_reached_fails_at_once(home: Home, capfd: Captured) -> None:
    store = register(home, ssh_alias="", host="127.0.0.1", port=1, last_seen=1.0)
    told = check(capfd, 1)
    assert outcomes(told, "failed") == ["reachable"]
    assert outcomes(told, "skipped") == list(STEPS[1:])
    (node,) = store._read_all()
    assert (node.status, node.last_seen) == (NodeStatus.UNREACHABLE, 1.0)
    assert "Connection refused" in node.last_error


@pytest.mark.parametrize("key", ["wrong", "gone"])
def test_a_key_that_does_not_fit_fails_at_the_login(
    mac: Host, home: Home, tmp_path: Path, capfd: Captured, key: str
) -> None:
    keygen(tmp_path / "wrong")
    register(home, ssh_alias="", host=mac.address, port=mac.port, user=mac.user,
             key=str(tmp_path / key))  # fmt: skip
    told = check(capfd, 1)
    assert outcomes(told, "failed") == ["auth"]
    assert outcomes(told, "ok") == (["reachable"] if key == "wrong" else [])
    assert told["status"] == "unreachable"


@pytest.mark.parametrize(
    ("changed", "failed", "status"),
    [
        ({"engines": {"vllm": None, "echo": __version__}}, "engine", "unusable"),
        ({"disk_free": 5}, "disk", "unusable"),
        ({"rbee": "0.0.1"}, "rbee", "unusable"),
        ({"import": "error: vLLM cannot be imported: OSError: libtorch"}, "engine", "unusable"),
    ],
)
def test_what_is_missing_there_fails_its_step(
    mac: Host, home: Home, capfd: Captured, changed: dict[str, Any], failed: str, status: str
) -> None:
    store = register(home, rbee_path=plant_detect(mac, **changed))
    told = check(capfd, 1)
    assert outcomes(told, "failed") == [failed]
    assert outcomes(told, "skipped") == (list(STEPS[7:]) if failed == "rbee" else [])
    assert [node.status.value for node in store._read_all()] == [status]


def test_no_python_is_not_taken_for_a_login_shell_that_fails(
    home: Home, tmp_path: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = 'ForceCommand PATH=/nowhere; eval "$SSH_ORIGINAL_COMMAND"'
    told = check_sshd(tmp_path, home, capfd, monkeypatch, forced)
    assert outcomes(told, "ok") == ["reachable", "auth", "exec"]
    assert outcomes(told, "failed") == ["python"]


def test_a_sshd_that_forwards_nothing_cannot_have_transport_ssh(
    home: Home, tmp_path: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = check_sshd(tmp_path, home, capfd, monkeypatch, "AllowTcpForwarding no")
    assert outcomes(told, "failed") == ["latency"]
    assert "AllowTcpForwarding must be yes" in told["hint"]
    assert told["steps"]["rbee"]["outcome"] == "ok"


def check_sshd(
    tmp_path: Path, home: Home, capfd: Captured, patch: pytest.MonkeyPatch, setting: str
) -> dict[str, Any]:
    if SSHD is None:
        pytest.skip("no sshd here")
    program = tmp_path / "rbee-hive"
    program.write_text(f"#!/bin/sh\necho '{json.dumps(DETECTED)}'\n")
    program.chmod(0o755)
    with open_sshd(tmp_path / "sshd", setting) as sshd:
        (tmp_path / ".ssh").mkdir()
        shutil.copy(sshd.known_hosts, tmp_path / ".ssh")
        patch.setenv("HOME", str(tmp_path))
        register(
            home, ssh_alias="", host=sshd.host, port=sshd.port, key=str(sshd.key),
            rbee_path=str(tmp_path), transport=Transport.SSH,
        )  # fmt: skip
        return check(capfd, 1)
