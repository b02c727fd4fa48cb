"""``$RBEE_HOME/queen.db``: one short transaction at a time, by several processes.

The journal is SQLite's rollback journal, not WAL: homes may be on NFS and shared by machines, and
WAL keeps its index in memory that processes on two machines cannot share, which damages the file.
The rollback journal needs only file locks, lets a read-only home be read, and with a dozen nodes
nobody waits for a writer.
"""

from __future__ import annotations

import os
import shlex
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from rbee import __version__
from rbee.errors import MachineError, RbeeError, UnavailableError

BUSY = 3.0  # seconds to wait for another process's transaction

# One statement each; version N has the first N. Only ever appended to: all versions are about.
MIGRATIONS = (
    """
    CREATE TABLE nodes (
        name TEXT PRIMARY KEY NOT NULL,
        host TEXT NOT NULL,
        port INTEGER,
        user TEXT NOT NULL,
        key TEXT NOT NULL,
        ssh_alias TEXT NOT NULL,
        rbee_path TEXT NOT NULL,
        environment TEXT NOT NULL,
        transport TEXT NOT NULL,
        status TEXT NOT NULL,
        last_seen REAL NOT NULL,
        last_error TEXT NOT NULL,
        capabilities TEXT NOT NULL,
        created REAL NOT NULL
    )
    """,
)


@contextmanager
def open_to_read(
    path: Path, migrations: Sequence[str] = MIGRATIONS
) -> Iterator[sqlite3.Connection | None]:
    """Yield the database, read-only; None if there is none yet, which makes none.

    Raises:
        MachineError: it cannot be read, is damaged, or was made by a newer rbee.
        UnavailableError: another process holds it for too long.
    """
    with _told(path):
        if not _is_there(path, migrations):
            yield None
            return
        with closing(_connect(path, "ro")) as connection:
            yield connection


def _is_there(path: Path, migrations: Sequence[str]) -> bool:
    """Tell whether there is something to read; an older database is brought up to date."""
    if not path.exists():
        return False
    with closing(_connect(path, "ro")) as connection:
        version = _version(connection, path, len(migrations))
    if 0 < version < len(migrations):
        with open_to_write(path, migrations):
            pass
    return version > 0


@contextmanager
def open_to_write(
    path: Path, migrations: Sequence[str] = MIGRATIONS
) -> Iterator[sqlite3.Connection]:
    """Yield the database, made or brought up to date, in one transaction: all of it or nothing.

    Raises:
        MachineError: it cannot be written, is damaged, or was made by a newer rbee.
        UnavailableError: another process holds it for too long.
    """
    with _told(path):
        _make_private(path)
        with closing(_connect(path, "rw")) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                _migrate(connection, path, migrations)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY, isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection


def _make_private(path: Path) -> None:
    """Have the file there before SQLite makes it: its journal gets the same mode."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(0o600)


def _migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    version = _version(connection, path, len(migrations))
    for statement in migrations[version:]:
        connection.execute(statement)
    if version < len(migrations):
        connection.execute(f"PRAGMA user_version = {len(migrations)}")


def _version(connection: sqlite3.Connection, path: Path, known: int) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > known:
        raise MachineError(
            f"{path} has version {version}; this rbee ({__version__}) knows up to {known}",
            code="database_newer",
            hint=f"RBEE_HOME=~/.rbee-{__version__} rbee-keeper node list   # or use the newer rbee",
        )
    return int(version)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise _error_of(path, exc) from exc
    except OSError as exc:
        raise _not_writable(path, exc.strerror or str(exc)) from exc


def _error_of(path: Path, exc: sqlite3.Error) -> RbeeError:
    name = getattr(exc, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return UnavailableError(
            f"{path} is in use by another process for more than {BUSY:g} s",
            code="database_busy",
            hint=f"fuser -v {shlex.quote(str(path))}",
        )
    unreachable = ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_FULL", "SQLITE_IO")
    if name.startswith(unreachable):
        return _not_writable(path, str(exc))
    return damaged(path, str(exc))


def _not_writable(path: Path, why: str) -> MachineError:
    return MachineError(
        f"cannot open or write {path}: {why} (rbee needs a writable home with free space)",
        code="home_not_writable",
        hint=f"ls -ld {shlex.quote(str(path.parent))} {shlex.quote(str(path))}",
    )


def damaged(path: Path, why: str) -> MachineError:
    """Return the error for a database that is not as rbee has left it."""
    place = shlex.quote(str(path))
    return MachineError(
        f"{path} is damaged: {why}",
        code="database_damaged",
        hint=f"mv {place} {place}.damaged   # then add your nodes again",
    )
