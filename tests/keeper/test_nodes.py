"""``node list|show|update|remove``, with no queen about."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import attrs
import pytest

from rbee.home import Home
from rbee.keeper.app import run_line
from rbee.keeper.nodes import devices_in_words, engines_in_words
from rbee.nodes.node import Node, NodeStatus
from rbee.nodes.store import NodeStore

Captured = pytest.CaptureFixture[str]
GIB = 1 << 30
CAPABILITIES = {
    "rbee": "0.1.0",
    "python": "3.11.7",
    "cpus": 8,
    "devices": [
        {"backend": "cpu", "index": 0, "name": "Xeon", "memory_total": 64 * GIB},
        {"backend": "cuda", "index": 0, "name": "NVIDIA H200", "memory_total": 140 * GIB},
        {"backend": "cuda", "index": 1, "name": "NVIDIA H200", "memory_total": 140 * GIB},
    ],
    "engines": {"vllm": "0.25.1", "echo": None},
}
MAC = Node(
    "mac", host="192.0.2.7", user="me", status=NodeStatus.UNREACHABLE, last_error="refused\nlog",
    capabilities=CAPABILITIES, environment={"API_TOKEN": "hush", "A": "1"},
    last_seen=time.time() - 7300,
)  # fmt: skip


@pytest.fixture
def mac(home: Home) -> NodeStore:
    store = NodeStore.of(home)
    store._insert(MAC)
    return store


def told(line: list[str], capfd: Captured) -> Any:
    assert run_line([*line, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_this_machine_is_listed_without_any_registered(home: Home, capfd: Captured) -> None:
    assert [node["name"] for node in told(["node", "list"], capfd)] == ["localhost"]
    assert run_line(["node", "list"]) == 0
    assert "this machine" in capfd.readouterr().out
    assert told(["node", "show", "localhost"], capfd)["status"] == "ready"
    assert not home.queen_db.exists()


def test_nodes_are_listed_in_a_line_each(mac: NodeStore, capfd: Captured) -> None:
    assert run_line(["node", "list"]) == 0
    head, here, line = capfd.readouterr().out.splitlines()
    assert head.split()[:4] == ["NODE", "STATUS", "ADDRESS", "TRANSPORT"]
    assert here.startswith("localhost")
    for word in ("mac", "unreachable", "me@192.0.2.7", "0.1.0", "2 × NVIDIA H200 (140.0 GiB)",
                 "2 hours ago", "refused"):  # fmt: skip
        assert word in line
    assert told(["node", "list"], capfd)[1]["capabilities"] == CAPABILITIES


def test_a_node_is_shown_without_secrets(mac: NodeStore, capfd: Captured) -> None:
    assert run_line(["node", "show", "mac"]) == 0
    text = capfd.readouterr().out
    for word in ("3.11.7", "vllm 0.25.1", "API_TOKEN=***, A=1", "~/.rbee/venv/bin", "log"):
        assert word in text
    shown = told(["node", "show", "mac"], capfd)
    assert shown["name"] == "mac"
    assert "hush" not in text + json.dumps(shown)


def test_an_update_changes_what_is_given(
    mac: NodeStore, home: Home, capfd: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "id").write_text("-----BEGIN")
    (tmp_path / "id").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RBEE_HOST", "127.0.0.1")  # where a queen listens
    home.config_file.write_text("port = 8080\n")
    line = ["node", "update", "mac", "--port", "2222", "--transport", "ssh", "--key", "id",
            "--env", "B=x=y", "--env", "A="]  # fmt: skip
    assert told(line, capfd)["port"] == 2222
    (after,) = mac._read_all()
    assert (after.host, after.user, after.key) == ("192.0.2.7", "me", str(tmp_path / "id"))
    assert after.environment == {"API_TOKEN": "hush", "B": "x=y"}
    cleared = ["node", "update", "mac", "--port", "", "--transport", "", "--key", "", "--user", ""]
    told(cleared, capfd)
    (after,) = mac._read_all()
    assert (after.port, after.transport.value, after.key, after.user) == (None, "direct", "", "")


def test_an_update_is_shown_to_people(mac: NodeStore, capfd: Captured) -> None:
    assert run_line(["node", "update", "mac", "--user", "you"]) == 0
    assert "you@192.0.2.7" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("line", "code", "why"),
    [
        (["show", "pc"], 1, "no node 'pc'; known: localhost, mac"),
        (["remove", "pc"], 1, "no node 'pc'"),
        (["remove", "localhost"], 1, "is this machine"),
        (["update", "localhost", "--user", "x"], 1, "is this machine"),
        (["update", "mac"], 2, "nothing to change"),
        (["update", "mac", "--port", "70000"], 2, "port '70000' is not between 1 and 65535"),
        (["update", "mac", "--port", "0"], 2, "port '0'"),
        (["update", "mac", "--transport", "x"], 2, "transport"),
        (["update", "mac", "--env", "A"], 2, "'A' is not NAME=VALUE"),
        (["update", "mac", "--env", "HF_TOKEN=hush"], 1, "never stored"),
        (["update", "mac", "--env", "A=\udcff"], 1, "cannot be an environment variable"),
        (["update", "mac", "--key", "~nosuch/id"], 2, "no home directory of nosuch"),
        (["update", "mac", "--host", "a b"], 1, "neither a host name"),
        (["update", "mac", "--key", "/nowhere/id"], 1, "no key file /nowhere/id"),
        (["update", "mac", "--from-ssh-config", "x"], 1, "excludes --host, --user"),
    ],
)
def test_what_is_wrong_is_one_error_and_changes_nothing(
    mac: NodeStore, capfd: Captured, line: list[str], code: int, why: str
) -> None:
    assert run_line(["node", *line]) == code
    out, err = capfd.readouterr()
    assert why in err
    assert "hint: --" not in err
    assert "hint: " in err
    assert "hush" not in err
    assert out == ""
    assert mac._read_all() == [MAC]


def test_a_removed_node_is_gone(mac: NodeStore, capfd: Captured) -> None:
    assert told(["node", "remove", "mac"], capfd) == {"node": "mac", "removed": True}
    assert mac._read_all() == []
    mac._insert(attrs.evolve(MAC))
    assert run_line(["node", "remove", "mac"]) == 0
    assert capfd.readouterr().err == "removed mac\n"


def test_a_database_that_cannot_be_used_is_one_error(home: Home, capfd: Captured) -> None:
    home.queen_db.write_text("this is no database at all\n" * 9)
    assert run_line(["node", "list"]) == 1
    err = capfd.readouterr().err
    assert "is damaged" in err
    assert "hint: mv " in err


@pytest.mark.parametrize("odd", [{}, {"devices": 1, "engines": 2}, {"devices": [1, {}]}])
def test_capabilities_of_another_version_are_no_reason_to_fail(odd: dict[str, Any]) -> None:
    assert "cpu" not in devices_in_words(odd)
    assert engines_in_words(odd) == ""
