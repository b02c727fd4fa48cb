"""The two black-box scripts, as a user would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rbee.home import Home
from rbee.testing.processes import LeakCheck

HERE = Path(__file__).parent
LONG = ["--model", "echo?rate=20", "--engine", "echo", "--prompt", "one two three"]

pytestmark = pytest.mark.slow


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(HERE / name), *arguments],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_killing_the_keeper_ends_everything_it_owns(leaks: LeakCheck) -> None:
    done = run_script("ephemeral.sh", *LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert leaks.find() == []


def test_an_operators_queen_and_hive_survive_a_killed_keeper(home: Home, leaks: LeakCheck) -> None:
    done = run_script("persistent.sh", *LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    leaks.wait_clean_sync(10)
