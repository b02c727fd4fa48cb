"""A journal written by hand, and the processes that it names."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rbee import guard
from tests.trees import STUBBORN, code

DEAD = {"pid": 2**22 + 1, "start": 5}  # above any pid


def process(pid: int) -> dict[str, int]:
    return {"pid": pid, "start": guard.start_time(pid)}


def write(run_dir: Path, **changes: Any) -> Path:
    record = {
        "boot_id": guard.boot_id(), "nonce": "", "guard": DEAD, "child": DEAD, "descendants": [],
        "shm": [], "run_file": "", **changes,
    }  # fmt: skip
    path = run_dir / f"guard-{len(list(run_dir.iterdir())) + 1}.json"
    path.write_text(json.dumps(record))
    return path


@contextmanager
def planted(source: str = STUBBORN) -> Iterator[int]:
    """Run a child that does not end by itself."""
    with subprocess.Popen(code(source), stdout=subprocess.PIPE, stdin=subprocess.PIPE) as child:
        child.stdout.readline()
        try:
            yield child.pid
        finally:
            child.kill()
