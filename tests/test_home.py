"""Where things are, that they are private, and what is said when they cannot be written."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from rbee.errors import MachineError, UsageError
from rbee.home import (
    Home,
    default_root,
    find_home,
    open_home,
    read_token,
    read_token_file,
    short_name,
    write_atomic,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_home_is_made_private_with_a_link_to_its_run_directory(home: Home) -> None:
    for path in (home.root, home.models, home.logs, home.run):
        assert mode(path) == 0o700
    assert (home.root / "run").readlink() == home.run
    assert open_home() == home


def test_the_home_is_the_argument_then_the_environment_then_the_default(tmp_path: Path) -> None:
    assert find_home(tmp_path, {"RBEE_HOME": "/x"}).root == tmp_path
    assert find_home(None, {"RBEE_HOME": "/x"}).root == Path("/x")
    assert default_root({"RBEE_HOME": ""}) == Path("~/.rbee").expanduser()
    assert find_home("~/y", {}).root == Path("~/y").expanduser()
    for root, environ in (("~nosuch/y", {}), (None, {"RBEE_HOME": "~nosuch"})):
        with pytest.raises(UsageError, match="no home directory of nosuch on this machine"):
            find_home(root, environ)


def test_the_run_directory_is_short_local_and_one_per_home(home: Home) -> None:
    user = os.getuid()
    one, two = find_home("/a" * 300, {}), find_home("/b", {})
    assert str(one.run).startswith(f"/tmp/rbee-{user}-")
    assert one.run != two.run
    assert len(str(one.run)) < 40
    runtime = home.run.parent
    assert find_home("/b", {"XDG_RUNTIME_DIR": str(runtime)}).run.parent == runtime
    for unfit in (runtime / "gone", runtime / "too-long-for-a-socket"):
        assert find_home("/b", {"XDG_RUNTIME_DIR": str(unfit)}) == two


def test_the_short_name_of_an_id_keeps_what_tells_it_apart() -> None:
    assert short_name("worker-3f9a1c2e") == "w3f9a1c2e"


def test_a_home_that_cannot_be_written_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot write") as info:
        open_home(tmp_path / "file" / "home", {})
    assert info.value.code == "home_not_writable"
    assert str(tmp_path / "file" / "home") in info.value.message
    assert "RBEE_HOME=" in info.value.hint


def test_a_run_directory_that_is_a_link_is_refused(home: Home, tmp_path: Path) -> None:
    home.run.rmdir()
    home.run.symlink_to(tmp_path)
    with pytest.raises(MachineError, match="is not a directory of yours") as info:
        open_home()
    assert info.value.code == "run_dir_not_private"
    assert info.value.hint == f"ls -ld {home.run}"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a directory away")
def test_a_run_directory_of_somebody_else_is_refused(home: Home) -> None:
    os.chown(home.run, 12345, -1)
    with pytest.raises(MachineError, match="found uid 12345"):
        open_home()


def test_a_run_directory_that_others_can_read_is_closed(home: Home) -> None:
    home.run.chmod(0o755)
    open_home()
    assert mode(home.run) == 0o700


def test_a_directory_in_the_place_of_the_link_is_an_error_and_leaves_nothing(home: Home) -> None:
    (home.root / "run").unlink()
    (home.root / "run").mkdir()
    before = sorted(os.listdir(home.root))
    with pytest.raises(MachineError):
        open_home()
    assert sorted(os.listdir(home.root)) == before


# the token ------------------------------------------------------------------------------------
def test_the_token_is_made_once_and_private(home: Home) -> None:
    token = read_token(home)
    assert len(token) == 48
    assert mode(home.token_file) == 0o600
    assert read_token(home) == token
    assert [name for name in os.listdir(home.root) if "token" in name] == ["token"]


def test_all_who_start_at_once_read_the_same_token(home: Home) -> None:
    tokens: list[str] = []
    barrier = threading.Barrier(8)

    def read() -> None:
        barrier.wait()
        tokens.append(read_token(home))

    for _ in range(20):
        home.token_file.unlink(missing_ok=True)
        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(tokens)) == 1
        tokens.clear()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"hidden\xff", "holds no token: one word .* got 7 characters"),
        (b"hidden\nhidden2\n", "holds no token"),
        (b"hid den", "holds no token"),
        (b"hidden" * 100, "at most 512 .* got 600"),
        (b"hidden" * 1000, "got 4096"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_token_file_without_a_token_is_an_error_that_does_not_quote_it(
    home: Home, content: bytes, told: str
) -> None:
    write_atomic(home.token_file, "")
    home.token_file.write_bytes(content)
    with pytest.raises(MachineError, match=told) as info:
        read_token(home)
    assert str(home.token_file) in info.value.hint
    assert "hid" not in str(info.value)


@pytest.mark.parametrize("bits", [0o604, 0o640, 0o620, 0o602, 0o644, 0o777])
def test_a_token_file_that_others_may_open_is_refused(home: Home, bits: int) -> None:
    read_token(home)
    home.token_file.chmod(bits)
    with pytest.raises(MachineError, match=rf"open to others \(mode {bits:04o}\)") as info:
        read_token(home)
    assert info.value.hint == f"chmod 600 {home.token_file}"
    home.token_file.chmod(0o400)
    assert read_token(home)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a file away")
def test_a_token_file_of_somebody_else_is_his_to_keep(home: Home) -> None:
    read_token(home)
    home.token_file.chmod(0o644)
    os.chown(home.token_file, 12345, -1)
    assert read_token(home)


def test_a_token_may_come_through_a_pipe() -> None:
    """A shell's ``--token-file <(command)``, which is no file at all."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b"secret\n")
        os.close(writing)
        assert read_token_file(Path(f"/dev/fd/{reading}")) == "secret"
    finally:
        os.close(reading)


@pytest.mark.parametrize("name", ["none", "."])
def test_a_token_file_that_cannot_be_read_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(MachineError, match=r"cannot read the token file .*: [A-Z]"):
        read_token_file(tmp_path / name)


# atomic writes --------------------------------------------------------------------------------
def test_an_atomic_write_replaces_privately(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    write_atomic(path, "nëw")
    assert path.read_text(encoding="utf-8") == "nëw"
    assert mode(path) == 0o600


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[failing], full)
    with pytest.raises(MachineError, match="No space left"):
        write_atomic(path, "new")
    assert os.listdir(tmp_path) == ["x.json"]
    assert path.read_text() == "old"


def test_a_text_that_cannot_be_encoded_leaves_no_half(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "x", "\ud800")
    assert os.listdir(tmp_path) == []
