"""What every test gets: a home of its own, no ERROR in the log, and nothing left at the end."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rbee.home import Home, open_home
from rbee.testing.cluster import hear_interrupts
from rbee.testing.processes import LeakCheck, LeakError, Tree
from tests.environment import VENV

SESSION_MARKER = "RBEE_TEST_SESSION"
SESSION_GRACE = 2.0  # the last tests' children may still be on their way out
SESSION_CHECK = pytest.StashKey[LeakCheck]()


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def error_records() -> Iterator[list[logging.LogRecord]]:
    """Fail a test that logs an ERROR; one that provokes it looks at this list and clears it."""
    handler = _Errors()
    logging.getLogger().addHandler(handler)
    yield handler.records
    logging.getLogger().removeHandler(handler)
    lines = [f"{record.name}: {record.getMessage()}" for record in handler.records]
    assert not lines, "ERROR in the log:\n" + "\n".join(lines)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Make a directory with a short path: those of unix sockets end at 107 bytes."""
    path = tempfile.mkdtemp(prefix="rbee-t-", dir="/tmp")
    yield Path(path)
    shutil.rmtree(path)


@pytest.fixture
def home(tmp_path: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Make an ``RBEE_HOME`` of this test's own; its run directory has a short path."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    monkeypatch.setenv("RBEE_HOME", str(tmp_path / "home"))
    return open_home()


@pytest.fixture
def nonce(monkeypatch: pytest.MonkeyPatch) -> str:
    """Mark whatever this test starts."""
    value = secrets.token_hex(8)
    monkeypatch.setenv("RBEE_NONCE", value)
    monkeypatch.setenv("SPT_NOENV", "1")  # setproctitle leaves the environment readable
    return value


@pytest.fixture
def leaks(home: Home, nonce: str) -> Iterator[LeakCheck]:
    """Watch what this test starts; fail it (and clean up) if any process is left at its end.

    Call ``leaks.tree.refresh(pid)`` once something runs, and ``await leaks.wait_clean(10)``.
    """
    with Tree() as tree:
        check = LeakCheck(home=home, nonce=nonce, tree=tree, venv=VENV)
        yield check
        left = [i for i in check.kill() if i.kind == "process" and i.is_certain]
        if left:
            raise LeakError(left, 0)


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Return the models directory that is kept between runs, for real models only."""
    default = Path(__file__).parents[1] / ".cache/rbee-home"
    models = Path(os.environ.get("RBEE_TEST_HOME", default)) / "models"
    models.mkdir(parents=True, exist_ok=True)
    return models


@pytest.fixture(scope="session", autouse=True)
def vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give vLLM an empty cache, as on a machine that never ran it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("vllm-cache")))
        yield


def pytest_sessionstart(session: pytest.Session) -> None:
    hear_interrupts()
    os.environ[SESSION_MARKER] = marker = secrets.token_hex(8)
    session.stash[SESSION_CHECK] = LeakCheck(
        nonce=marker, marker=SESSION_MARKER, tree=Tree(os.getpid()), venv=VENV
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the whole run when anything that it started is still there."""
    check = session.stash.get(SESSION_CHECK, None)
    if check is None:
        return
    try:
        check.wait_clean_sync(SESSION_GRACE)
    except LeakError as error:
        check.kill()
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        reporter.ensure_newline()
        reporter.section("left behind by the tests", red=True)
        reporter.line(str(error))
