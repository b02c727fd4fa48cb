"""What a node's entry may say, what a change makes of it, and what others are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from rbee.errors import BadInputError, ConflictError
from rbee.nodes.node import HIDDEN, RBEE_PATH, Node, NodeStatus, Transport, changed, new_node, told
from rbee.wire.messages import AddNode, UpdateNode

ADD, UPDATE = "rbee-keeper node add mac", "rbee-keeper node update mac"
MAC = Node("mac", host="mac.local", user="me", status=NodeStatus.READY, capabilities={"rbee": "1"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", "mac"), ("host", "mac.local"), ("host", "192.0.2.7"), ("host", "2001:db8::1"),
        ("host", "fe80::1%eth0"), ("host", "my_box"), ("port", 1), ("port", 65535),
        ("user", "a b;$(id)'\""), ("user", "LAB\\me"), ("key", "/a b/id"), ("ssh_alias", "gpu-1"),
        ("rbee_path", "/opt/rb ee/bin"), ("rbee_path", "~/r/bin"), ("transport", "ssh"),
        ("environment", {"OMP_NUM_THREADS": "8", "X": "a\nb;$(c)"}),
    ],
)  # fmt: skip
def test_what_is_right_is_kept_as_it_is(field: str, value: Any) -> None:
    node = new_node(AddNode("mac", **{field: value}))
    assert getattr(node, field) == (Transport(value) if field == "transport" else value)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("name", "Mac", "node name 'Mac' is not valid"),
        ("name", "", "is not valid"),
        ("name", "a" * 64, "is not valid"),
        ("host", "a b", "neither a host name nor"),
        ("host", "-oProxyCommand=x", "neither a host name nor"),
        ("host", "me@mac", "neither a host name nor"),
        ("host", "[::1]", "neither a host name nor"),
        ("host", "mac:22", "neither a host name nor"),
        ("host", "a" * 254, "neither a host name nor"),
        ("host", "a\n", "neither a host name nor"),
        ("port", 0, "port 0 is not between 1 and 65535"),
        ("port", 65536, "port 65536"),
        ("port", -1, "port -1"),
        ("user", "a\nb", "user .* is not valid"),
        ("key", "id_rsa", "is a relative path"),
        ("key", "./id_rsa", "is a relative path"),
        ("key", "/a\0b", "is not valid"),
        ("ssh_alias", "a b", "cannot be an alias"),
        ("ssh_alias", "*", "cannot be an alias"),
        ("ssh_alias", "-x", "cannot be an alias"),
        ("rbee_path", "bin", "is relative"),
        ("rbee_path", "~you/bin", "is relative"),
        ("rbee_path", "/a\nb", "is not valid"),
        ("transport", "carrier-pigeon", "transport 'carrier-pigeon' is unknown"),
        ("environment", {"A B": "1"}, "cannot be an environment variable"),
        ("environment", {"A": "\0"}, "cannot be an environment variable"),
        ("environment", {"RBEE_NONCE": "1"}, "rbee's own"),
        ("environment", {"HF_TOKEN": "secret"}, "HF_TOKEN is never stored"),
    ],
)
def test_what_is_wrong_is_refused_by_name_with_a_hint(field: str, value: Any, why: str) -> None:
    with pytest.raises(BadInputError, match=why) as caught:
        new_node(AddNode(**{"name": "mac", field: value}))
    assert caught.value.hint.startswith((f"{ADD} --", "grep ", "export ", "rbee-keeper infer "))
    assert "…" not in caught.value.hint
    assert "secret" not in str(caught.value) + caught.value.hint
    if (field, value) != ("port", 0) and field != "name":  # the default there; not there
        with pytest.raises(BadInputError, match=why) as caught:
            changed(new_node(AddNode("mac")), UpdateNode(**{field: value}))
        assert caught.value.hint.startswith((f"{UPDATE} --", "grep ", "export "))


def test_a_command_that_is_suggested_is_the_one_that_was_meant() -> None:
    environment = {"A": "a b", "API_TOKEN": "secret", "A_TOKEN$(x)": "secret"}
    with pytest.raises(BadInputError) as caught:
        new_node(AddNode("mac", "a b", user="me", rbee_path="~/bin", environment=environment))
    assert caught.value.hint == (
        f"{ADD} --user me --rbee-path '~/bin' --env 'A=a b' "
        '--env "API_TOKEN=$API_TOKEN" --host 192.0.2.7'
    )


def test_localhost_is_reserved() -> None:
    with pytest.raises(ConflictError, match="is this machine") as caught:
        new_node(AddNode("localhost"))
    assert caught.value.code == "reserved_node"


def test_a_user_in_the_host_is_told_where_it_belongs() -> None:
    with pytest.raises(BadInputError) as caught:
        new_node(AddNode("mac", host="me@mac.local"))
    assert caught.value.hint == f"{ADD} --user me --host mac.local"


@pytest.mark.parametrize("more", [{"host": "h"}, {"port": 22}, {"user": "me"}, {"key": "/k"}])
def test_an_alias_excludes_what_it_says_itself(more: dict[str, Any]) -> None:
    with pytest.raises(BadInputError, match=f"excludes --{next(iter(more))}") as caught:
        new_node(AddNode("mac", ssh_alias="gpu", **more))
    assert caught.value.hint.startswith("rbee-keeper node add mac --from-ssh-config gpu")
    assert f'--{next(iter(more))} ""' in caught.value.hint
    with pytest.raises(BadInputError) as caught:  # this one is registered
        changed(Node("mac", **more), UpdateNode(ssh_alias="gpu"))
    assert caught.value.hint.startswith("rbee-keeper node update mac --from-ssh-config gpu")


def test_a_keys_path_from_the_home_is_filled_in_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert new_node(AddNode("mac", key="~/k")).key == str(tmp_path / "k")
    assert new_node(AddNode("mac", rbee_path="~/bin")).rbee_path == "~/bin"  # of the node


def test_the_address_is_the_name_where_no_host_is_given() -> None:
    assert Node("mac").address == "mac"
    assert MAC.address == "me@mac.local"
    assert Node("mac", host="::1", port=2222).address == "[::1]:2222"
    assert Node("mac", ssh_alias="gpu").address == "gpu (ssh config)"


def test_a_change_changes_what_is_given_only() -> None:
    assert changed(MAC, UpdateNode()) is MAC
    assert changed(MAC, UpdateNode(user="me")) is MAC
    after = changed(MAC, UpdateNode(transport="ssh"))
    assert after == attrs.evolve(MAC, transport=Transport.SSH, status=NodeStatus.UNKNOWN)


def test_an_empty_value_brings_back_the_default() -> None:
    full = new_node(
        AddNode("mac", "h", 1, "u", "/k", "", "/b", {"A": "1", "B": "2"}, transport="ssh")
    )
    cleared = changed(
        full, UpdateNode("", 0, "", "", "", "", environment={"A": "", "C": "3"}, transport="")
    )
    assert cleared == Node("mac", environment={"B": "2", "C": "3"})
    assert cleared.rbee_path == RBEE_PATH


@pytest.mark.parametrize(
    "update", [{"host": "h"}, {"port": 1}, {"user": "u"}, {"key": "/k"}, {"transport": "ssh"}]
)
def test_what_was_found_out_is_forgotten_where_it_may_not_hold(update: dict[str, Any]) -> None:
    broken = attrs.evolve(MAC, status=NodeStatus.UNREACHABLE, last_error="refused", last_seen=1.0)
    after = changed(broken, UpdateNode(**update))
    assert (after.status, after.last_error) == (NodeStatus.UNKNOWN, "")
    may_be_another = "transport" not in update
    assert (after.capabilities, after.last_seen) == (
        ({}, 0.0) if may_be_another else (MAC.capabilities, 1.0)
    )


def test_a_wrong_change_is_refused() -> None:
    with pytest.raises(BadInputError, match="port 70000"):
        changed(MAC, UpdateNode(port=70000))
    with pytest.raises(BadInputError, match="excludes --host, --user"):
        changed(MAC, UpdateNode(ssh_alias="gpu"))
    assert changed(MAC, UpdateNode(ssh_alias="gpu", host="", user="")).ssh_alias == "gpu"


def test_values_named_like_secrets_are_not_told() -> None:
    names = ("AWS_SECRET", "API_KEY", "my_token", "DB_PASSWORD")
    node = attrs.evolve(MAC, environment=dict.fromkeys((*names, "KEYBOARD"), "v"), key="/k")
    info = told(node)
    assert info.environment == {**dict.fromkeys(names, HIDDEN), "KEYBOARD": "v"}
    assert (info.key, info.status, info.address) == ("/k", "ready", "me@mac.local")
