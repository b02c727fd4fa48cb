from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from rbee import guard, log_files
from rbee.home import Home


@contextmanager
def stderr_to(path: Path, flags: int = os.O_APPEND) -> Iterator[None]:
    before = os.dup(2)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(file)


def test_the_newest_logs_of_a_kind_stay(tmp_path: Path) -> None:
    names = [f"model-{number}.log" for number in range(log_files.KEPT + 5)]
    for age, name in enumerate(reversed([*names, "queen.log"])):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    log_files.prune_logs(tmp_path, "model", running={names[0]})
    assert {path.name for path in tmp_path.iterdir()} == {names[0], *names[5:], "queen.log"}


def test_a_log_that_goes_meanwhile_is_no_error(tmp_path: Path) -> None:
    assert log_files._modified(tmp_path / "gone") == 0


async def test_a_daemon_keeps_its_own_log_short(
    home: Home, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    monkeypatch.setattr(guard, "LOG_CAP", 1000)
    path = home.log_file("queen")
    with stderr_to(path), trio.move_on_after(1):
        os.write(2, b"o" + b"x" * 1000)
        await log_files.keep_own_log_short()
    assert (path.stat().st_size, path.with_name("queen.log.1").read_bytes()) == (0, b"x" * 1000)


def test_what_an_operator_has_redirected_is_not_ours(home: Home, tmp_path: Path) -> None:
    with stderr_to(tmp_path / "mine"):
        assert log_files.own_log() is None
    with stderr_to(home.log_file("queen"), flags=0):  # cutting it would leave a hole
        assert log_files.own_log() is None
