from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from rbee import guard
from rbee.errors import ConflictError, PeerError, UnavailableError
from rbee.home import Home
from rbee.keeper import operator
from rbee.keeper.flags import DataFlags, ListenFlags
from rbee.keeper.operator import start_queen, stop_queen
from rbee.running import find_run_file
from rbee.testing.processes import LeakCheck
from tests.keeper.fake_queen import FakeQueen, note, open_fake

TREE = Path(__file__).parents[2]


async def start(home: Home) -> operator.Standing:
    return await start_queen(home, host="127.0.0.1", port=0)


@pytest.mark.slow
async def test_a_queen_stands_from_start_to_stop(
    home: Home, leaks: LeakCheck, capfd: pytest.CaptureFixture[str]
) -> None:
    with trio.fail_after(40):
        standing = await start(home)
        assert not standing.already
        record = find_run_file(home)
        assert record is not None
        assert (record.pid, record.url, record.owner) == (standing.pid, standing.url, "operator")
        again = await start(home)
        assert (again.pid, again.already) == (standing.pid, True)
        await operator.print_start(ListenFlags())
        assert capfd.readouterr().out == f"{standing.url}\n"
        seconds = await stop_queen(home)
        assert seconds is not None
        assert seconds < 9
        assert guard.start_time(standing.pid) == 0
        assert await stop_queen(home) is None


async def test_stop_without_a_queen_is_fine(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    await operator.print_stop(DataFlags(json=True))
    out, err = capfd.readouterr()
    assert json.loads(out) == {"stopped": False, "seconds": 0.0}
    assert err == "no queen running\n"


@pytest.mark.slow
async def test_a_queen_that_cannot_start_says_why(home: Home, leaks: LeakCheck) -> None:
    with trio.fail_after(30), pytest.raises(UnavailableError, match="did not start") as caught:
        await start_queen(home, host="192.0.2.1", port=0)
    assert "192.0.2.1" in caught.value.message


async def test_a_commands_queen_is_not_taken_for_an_operators(home: Home) -> None:
    async with open_fake(FakeQueen(owner="keeper-1"), home):
        with pytest.raises(ConflictError, match="keeper-1"):
            await start(home)


@pytest.mark.slow
async def test_a_queen_that_hears_nothing_is_stopped_by_signal(home: Home) -> None:
    deaf = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    note(home, FakeQueen(), "http://127.0.0.1:1", pid=deaf.pid)
    with trio.fail_after(10):
        assert await stop_queen(home) is not None
    assert deaf.wait() == -15


@pytest.mark.slow
async def test_what_outlives_the_stop_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    )
    stubborn = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    note(home, FakeQueen(), "http://127.0.0.1:1", pid=stubborn.pid)
    monkeypatch.setattr(operator, "Grace", lambda: type("Short", (), {"keeper": 0.3}))
    try:
        with pytest.raises(PeerError, match=str(stubborn.pid)) as caught:
            await stop_queen(home)
        assert caught.value.hint == f"kill -9 {stubborn.pid}"
    finally:
        stubborn.kill()
        stubborn.communicate()
