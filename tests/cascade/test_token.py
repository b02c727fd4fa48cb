"""The token of a running cluster is in its token file, and nowhere else that can be looked at."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rbee.home import Home, read_token_file
from rbee.testing.processes import LeakCheck, carriers, title_of
from tests.cascade.keeper import running_infer

pytestmark = pytest.mark.slow


def of_processes(nonce: str) -> Iterator[tuple[str, bytes]]:
    """Yield what anybody, or the same user, can see of each process of a cluster."""
    for pid in carriers(nonce):
        for name in ("cmdline", "environ", "comm"):
            with suppress(OSError):  # it has just ended
                yield f"{title_of(pid)} {name}", Path(f"/proc/{pid}/{name}").read_bytes()


def of_files(home: Home) -> Iterator[tuple[str, bytes]]:
    for root in (home.root, home.run):
        for path in root.rglob("*"):
            with suppress(OSError):  # it has just been removed
                if stat.S_ISREG(path.lstat().st_mode) and path.name != "token":
                    yield str(path), path.read_bytes()


def test_the_token_is_seen_in_no_process_file_or_output(
    home: Home, nonce: str, leaks: LeakCheck
) -> None:
    env = os.environ | {"RBEE_LOG_LEVEL": "DEBUG"}
    with running_infer("echo?rate=50", "--max-tokens", "4000", env=env) as infer:
        leaks.tree.refresh(infer.pid)
        infer.read_some()
        (token_file,) = home.run.glob("q*/token")
        token = read_token_file(token_file).encode()
        seen = dict(of_processes(nonce))
        seen |= dict(of_files(home))
        infer.signal(signal.SIGINT)
        done = infer.end()
    assert done.code == 130, done.err
    seen |= dict(of_files(home))  # what was logged on the way out as well
    seen |= {"stdout": done.out.encode(), "stderr": done.err.encode()}
    assert [where for where, data in seen.items() if token in data] == []
    names = " ".join(seen)
    for what in ("queen-rbee cmd", "rbee-hive env", "llm-worker-rbee env", "rbee-zygote", "guard"):
        assert what in names
    for log in ("queen", "hive", "worker-"):
        assert f"{home.logs}/{log}" in names
    for title in ("queen-rbee", "rbee-hive", "llm-worker-rbee"):
        (environ,) = [data for where, data in seen.items() if where == f"{title} environ"]
        assert b"RBEE_LOG_LEVEL=DEBUG" in environ
