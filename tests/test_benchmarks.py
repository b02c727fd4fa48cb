"""A benchmark that is ended early takes with it what it has started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from rbee.testing.processes import Identity, descendants, identify, is_running, scan

RELAY = Path(__file__).parents[1] / "benchmarks" / "relay.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler"),
]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


async def seen_below(root: int, name: str) -> dict[Identity, str]:
    """Return what a process has started, and how each is called, once one is called so."""
    while True:
        found = {identify(pid): name_of(pid) for pid in descendants(root, scan())}
        if name in found.values():
            return {known: called for known, called in found.items() if known}
        await trio.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_relay_worker_and_load_end_with_the_benchmark(
    number: signal.Signals, tmp_path: Path
) -> None:
    argv = [sys.executable, str(RELAY), "--only", "queen", "--loads", "64 x 30/s"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with trio.fail_after(60), subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL) as process:
        try:
            below = await seen_below(process.pid, "load")
            assert {"worker", "load"} < set(below.values())  # and the relay
            await trio.sleep(0.3)  # it has left the call that starts them
            process.send_signal(number)
            status = await trio.to_thread.run_sync(process.wait, 10)
            left = [name for one, name in below.items() if is_running(one)]
        finally:
            process.kill()
            for one in filter(is_running, below):
                os.kill(one.pid, signal.SIGKILL)
    assert (status, left, list(tmp_path.iterdir())) == (128 + number, [], [])
