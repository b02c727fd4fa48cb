"""The files that a node's entry names: private keys, and hosts of ssh_config."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.errors import BadInputError, MachineError, NotFoundError
from rbee.nodes.files import check_alias, check_files, check_key
from rbee.nodes.node import Node

PRIVATE = "-----BEGIN OPENSSH PRIVATE KEY-----\n"


def make_key(path: Path, mode: int = 0o600, text: str = PRIVATE) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_private_key_that_nobody_else_reads_is_fine(tmp_path: Path) -> None:
    check_key(make_key(tmp_path / "id"))
    check_key(make_key(tmp_path / "read-only", 0o400))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610])
def test_a_key_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = make_key(tmp_path / "my id", mode)
    with pytest.raises(BadInputError, match=f"mode {mode:04o}; needed: 0600") as caught:
        check_key(path)
    assert caught.value.hint == f"chmod 600 '{path}'"


def test_a_key_that_is_missing_or_no_file_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", make_key(tmp_path / "file") / "below"):
        with pytest.raises(NotFoundError, match=f"there is no key file {path}"):
            check_key(path)
    with pytest.raises(BadInputError, match="is not a file"):
        check_key(tmp_path)


def test_a_public_key_is_told_from_a_private_one(tmp_path: Path) -> None:
    path = make_key(tmp_path / "id.pub", text="ssh-ed25519 AAAA me\n")
    with pytest.raises(BadInputError, match="is a public key") as caught:
        check_key(path)
    assert caught.value.hint == f"ls -l {tmp_path / 'id'}"
    assert "AAAA" not in str(caught.value)


CONFIG = """\
# Host commented
Host gpu-1 gpu-2
  HostName 192.0.2.7
  User me
host=equals
Host "quoted" *.lab !old.lab
\tHOST indented
Match originalhost matched,other exec "true"
Host *
Hostname nothost
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ssh/config"
    path.parent.mkdir()
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize(
    "alias",
    ["gpu-1", "gpu-2", "GPU-2", "equals", "quoted", "new.lab", "indented", "matched", "other"],
)
def test_a_host_of_the_configuration_is_found(config: Path, alias: str) -> None:
    check_alias(alias, config)


@pytest.mark.parametrize("alias", ["commented", "old.lab", "nothost", "true", "me", "anything"])
def test_what_only_the_general_block_matches_is_no_host(config: Path, alias: str) -> None:
    with pytest.raises(NotFoundError, match=f"has no host '{alias}'") as caught:
        check_alias(alias, config)
    assert caught.value.code == "unknown_alias"
    assert str(config) in caught.value.hint


def test_a_host_that_is_nearly_right_is_suggested(config: Path) -> None:
    with pytest.raises(NotFoundError, match="did you mean 'gpu-1'"):
        check_alias("gpu1", config)


def test_included_files_are_looked_through(config: Path, tmp_path: Path) -> None:
    (config.parent / "more").mkdir()
    (config.parent / "more/one").write_text("Host relative\n")
    (tmp_path / "far").write_text(f"Host absolute\nInclude {config}\n")  # a circle ends
    config.write_text(f'Include more/* "{tmp_path}/far"\nInclude ~/gone\n')
    for alias in ("relative", "absolute"):
        check_alias(alias, config)
    with pytest.raises(NotFoundError, match="there are: absolute, relative"):
        check_alias("zzz", config)


@pytest.mark.parametrize("word", ["~nosuch/x", "**x", "/"])
def test_an_include_that_nobody_can_follow_is_told(config: Path, word: str) -> None:
    config.write_text(f"Include {word}\n")
    with pytest.raises(BadInputError) as caught:
        check_alias("gpu-1", config)
    assert caught.value.message.startswith(f"{config} cannot be used: Include {word}: ")
    assert caught.value.hint == f"grep -in include {config}"


def test_without_a_configuration_there_are_no_hosts(config: Path) -> None:
    config.unlink()
    with pytest.raises(NotFoundError, match="it names none"):
        check_alias("gpu-1", config)


def test_a_configuration_that_cannot_be_read_is_told(config: Path) -> None:
    config.unlink()
    config.mkdir()
    with pytest.raises(MachineError, match="cannot read the SSH configuration"):
        check_alias("gpu-1", config)


def test_a_broken_line_hides_no_other(config: Path) -> None:
    config.write_bytes(b'Host "open\nHost \xff\xfe\nHost fine\n')
    check_alias("fine", config)


def test_only_what_a_node_names_is_looked_at(config: Path, tmp_path: Path) -> None:
    check_files(Node("mac"))
    check_files(Node("mac", ssh_alias="gpu-1"))
    with pytest.raises(NotFoundError, match="has no host"):
        check_files(Node("mac", ssh_alias="gone"))
    with pytest.raises(NotFoundError, match="no key file"):
        check_files(Node("mac", key=str(tmp_path / "gone")))
