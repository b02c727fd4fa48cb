"""queen.db: private, all or nothing, told when it cannot be used."""

from __future__ import annotations

import os
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rbee.errors import MachineError, UnavailableError
from rbee.nodes import database
from rbee.nodes.database import MIGRATIONS, open_to_read, open_to_write

ONE = ("CREATE TABLE nodes (name TEXT)",)
TWO = (*ONE, "ALTER TABLE nodes ADD COLUMN colour TEXT DEFAULT 'red'")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    directory = tmp_path / "a home?mode=memory#%41"  # SQLite is given a URI
    directory.mkdir()
    return directory / "queen.db"


def put(path: Path, name: str, migrations: tuple[str, ...] = ONE) -> None:
    with open_to_write(path, migrations) as connection:
        connection.execute("INSERT INTO nodes (name) VALUES (?)", (name,))


def execute(path: Path, *statements: str, fail: bool = False) -> None:
    with open_to_write(path, ONE) as connection:
        for statement in statements:
            connection.execute(statement)
        if fail:
            raise ZeroDivisionError


def names(path: Path, migrations: tuple[str, ...] = ONE) -> list[str] | None:
    with open_to_read(path, migrations) as connection:
        if connection is None:
            return None
        return [row["name"] for row in connection.execute("SELECT name FROM nodes ORDER BY name")]


def test_reading_makes_nothing(path: Path) -> None:
    assert names(path) is None
    path.touch()  # somebody is just making it
    assert names(path) is None
    assert os.listdir(path.parent) == ["queen.db"]


def test_it_is_private_however_it_was_made(path: Path) -> None:
    before = os.umask(0)
    try:
        put(path, "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    put(path, "b")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["queen.db"]  # no journal, no shared memory


def test_what_fails_leaves_all_as_it_was(path: Path) -> None:
    put(path, "a")
    with pytest.raises(ZeroDivisionError):
        execute(path, "DELETE FROM nodes", fail=True)
    assert names(path) == ["a"]
    with pytest.raises(ZeroDivisionError), open_to_write(path.with_name("new.db"), ONE):
        raise ZeroDivisionError
    assert names(path.with_name("new.db")) is None


@pytest.mark.parametrize("writes", [True, False])
def test_an_older_version_is_brought_up_to_date(path: Path, writes: bool) -> None:
    put(path, "a")
    if writes:
        put(path, "b", TWO)
    assert names(path, TWO) == (["a", "b"] if writes else ["a"])
    with open_to_read(path, TWO) as connection:
        assert connection is not None
        (colour,) = connection.execute("SELECT colour FROM nodes WHERE name = 'a'").fetchone()
    assert colour == "red"


def test_a_newer_version_is_left_alone_and_told(path: Path) -> None:
    put(path, "a", TWO)
    before = path.read_bytes()
    for attempt in (names, lambda path: put(path, "b")):
        with pytest.raises(MachineError, match=r"has version 2; this rbee .* up to 1") as caught:
            attempt(path)
        assert caught.value.code == "database_newer"
        assert caught.value.hint.startswith("RBEE_HOME=")
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["text", "tail"])
def test_a_damaged_file_is_told_with_a_way_out(path: Path, damage: str) -> None:
    put(path, "a")
    whole = path.read_bytes()
    broken = b"this is no database at all\n" * 9 if damage == "text" else whole[:4096] + b"x" * 4096
    path.write_bytes(broken)
    for attempt in (names, lambda path: put(path, "b")):
        with pytest.raises(MachineError, match="is damaged") as caught:
            attempt(path)
        assert caught.value.code == "database_damaged"
        assert caught.value.hint.startswith("mv ")
    assert path.read_bytes() == broken


def test_a_database_of_something_else_is_told(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    with pytest.raises(MachineError, match="no such table"):
        names(path)


def test_a_directory_in_its_place_or_no_home_is_told(path: Path) -> None:
    with pytest.raises(MachineError, match="cannot open or write") as caught:
        put(path.parent / "gone/queen.db", "a")
    assert caught.value.code == "home_not_writable"
    path.mkdir()
    for attempt in (names, lambda path: put(path, "b")):
        with pytest.raises(MachineError, match="cannot open or write"):
            attempt(path)


def test_reading_writes_nothing(path: Path) -> None:
    put(path, "a")
    with open_to_read(path, ONE) as connection:
        assert connection is not None
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM nodes")


@contextmanager
def as_ordinary_user(path: Path) -> Iterator[None]:
    """Be nobody, who owns ``path``, where the tests run as root: root writes anywhere."""
    if os.getuid() != 0:
        yield
        return
    for found in (path, *path.iterdir()):
        os.chown(found, 65534, -1)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_home_that_cannot_be_written_can_be_read() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # pytest's are root's alone
        home = Path(directory)
        path = home / "queen.db"
        put(path, "a")
        path.chmod(0o400)
        home.chmod(0o500)
        with as_ordinary_user(home):
            assert names(path) == ["a"]
            with pytest.raises(MachineError, match="cannot open or write") as caught:
                put(path, "b")
        home.chmod(0o700)
    assert caught.value.code == "home_not_writable"


def test_a_full_disk_is_told(path: Path) -> None:
    with pytest.raises(MachineError, match="full") as caught:
        execute(path, "PRAGMA max_page_count = 2", "INSERT INTO nodes VALUES (zeroblob(100000))")
    assert caught.value.code == "home_not_writable"
    assert names(path) is None


def test_who_holds_it_too_long_is_told_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY", 0.05)
    with open_to_write(path, ONE), pytest.raises(UnavailableError, match="in use") as caught:
        put(path, "b")
    assert caught.value.code == "database_busy"


def test_writers_that_come_at_once_all_get_their_turn(path: Path) -> None:
    barrier = threading.Barrier(6)

    def write(name: str) -> None:
        barrier.wait()
        put(path, name)

    threads = [threading.Thread(target=write, args=(f"n{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(path) == [f"n{i}" for i in range(6)]


def test_migrations_are_one_statement_each() -> None:
    for migration in MIGRATIONS:
        assert sqlite3.complete_statement(migration + ";")
        assert ";" not in migration
