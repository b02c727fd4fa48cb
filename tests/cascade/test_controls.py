"""Positive controls: without the guard the leak check is red, with it green."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from rbee.guard import children
from rbee.home import Home
from rbee.process import open_guarded
from rbee.testing.processes import LeakCheck, LeakError, title_of

PLANT = [sys.executable, str(Path(__file__).parent / "plant.py")]
KINDS = ("VLLM::EngineCore", "planted-setsid", "planted-noenv")

pytestmark = [pytest.mark.slow, pytest.mark.alone]


async def test_without_a_guard_each_planted_child_turns_the_check_red(leaks: LeakCheck) -> None:
    assert leaks.tree is not None
    bare = subprocess.Popen(PLANT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert bare.stdout is not None
    assert bare.stdin is not None
    assert bare.stdout.readline() == b"planted\n"
    leaks.tree.refresh(bare.pid)
    bare.send_signal(signal.SIGKILL)
    bare.wait()
    bare.stdout.close()
    bare.stdin.close()
    with pytest.raises(LeakError) as caught:
        await leaks.wait_clean(0.5)
    left = "\n".join(map(str, caught.value.leftovers))
    assert all(kind in left for kind in KINDS), left
    # The one without an environment descends from nobody we know: its mapped files give it away.
    leaks.kill(guesses=True)
    assert leaks.find() == []


async def test_with_a_guard_none_of_them_outlives_the_program(home: Home, leaks: LeakCheck) -> None:
    assert leaks.tree is not None
    with trio.fail_after(15):
        async with open_guarded(
            PLANT, graces=[2.0], log_file=home.log_file("plant"), piped=True
        ) as (process, output):
            assert output is not None
            await trio.lowlevel.wait_readable(output.fileno())
            output_text = os.read(output.fileno(), 100)
            assert output_text.startswith(b"planted"), output_text
            leaks.tree.refresh(process.pid)
            titles = "\n".join(title_of(identity.pid) for identity in leaks.tree.running())
            assert all(kind in titles for kind in KINDS), titles
            (program,) = (pid for pid in children(process.pid) if "plant.py" in title_of(pid))
            leaks.tree.refresh(process.pid)
            os.kill(program, signal.SIGKILL)
            assert await process.wait() == 128 + signal.SIGKILL
        await leaks.wait_clean(2)
