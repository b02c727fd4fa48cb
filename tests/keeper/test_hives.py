"""``hive start|stop|status|list`` against a small queen."""

from __future__ import annotations

import json
import os
from typing import Any

import attrs
import pytest

from rbee import __version__, guard
from rbee.errors import ConflictError, NotFoundError, UnavailableError
from rbee.home import Home, write_atomic
from rbee.keeper import hives
from rbee.keeper.flags import NodeFlags
from rbee.wire import codec, messages
from tests.keeper.fake_queen import HIVE, FakeQueen, open_fake

Captured = pytest.CaptureFixture[str]
TOLD = attrs.evolve(HIVE, last_seen=2.4, workers=3, memory_total=4 << 30, memory_free=1 << 30)


def run_operators_hive(home: Home) -> None:
    """Write what an operator's hive of this home would have written about itself."""
    pid = os.getpid()
    record = messages.RunFile(
        "hive", "hive-7", "http://127.0.0.1:9200", pid, guard.start_time(pid), guard.boot_id(),
        __version__, "operator", str(home.token_file),
    )  # fmt: skip
    write_atomic(home.hive_file, codec.dumps(record).decode())


async def test_a_hive_is_started_once(home: Home, capfd: Captured) -> None:
    async with open_fake(FakeQueen(hives={}), home):
        await hives.start_hive(NodeFlags())
        out, err = capfd.readouterr()
        assert out == f"{HIVE.url}\n"
        assert err.startswith("queen: start a hive")
        await hives.start_hive(NodeFlags(node="localhost", json=True))
    out, err = capfd.readouterr()
    assert json.loads(out)["hive_id"] == "hive-2"
    assert "runs already" in err


async def test_a_hive_needs_a_queen(home: Home) -> None:
    with pytest.raises(UnavailableError, match="no queen running") as caught:
        await hives.start_hive(NodeFlags())
    assert caught.value.hint == "rbee-keeper queen start"


async def test_a_hive_is_stopped_once(home: Home, capfd: Captured) -> None:
    async with open_fake(home=home):
        await hives.stop_hive(NodeFlags())
        out, _ = capfd.readouterr()
        assert out.startswith("stopped in 0.")
        await hives.stop_hive(NodeFlags(json=True))
    out, err = capfd.readouterr()
    assert json.loads(out) == {"node": "localhost", "stopped": False, "seconds": 0.0}
    assert err == "no hive runs on localhost\n"


async def test_an_operators_hive_is_told_how_to_end(home: Home) -> None:
    queen = FakeQueen(hives={"localhost": attrs.evolve(HIVE, owner="operator")})
    async with open_fake(queen, home):
        with pytest.raises(ConflictError) as caught:
            await hives.stop_hive(NodeFlags())
    assert caught.value.hint == "kill 7"


async def test_without_a_queen_only_an_operators_hive_is_a_reason_to_refuse(
    home: Home, capfd: Captured
) -> None:
    await hives.stop_hive(NodeFlags())
    assert capfd.readouterr().err == "no queen running\n"
    run_operators_hive(home)
    with pytest.raises(ConflictError, match="operator") as caught:
        await hives.stop_hive(NodeFlags())
    assert caught.value.hint == f"kill {os.getpid()}"


@pytest.mark.parametrize("command", [hives.list_hives, hives.show_hive])
async def test_hives_are_shown_with_what_they_have_told(
    home: Home, capfd: Captured, command: Any
) -> None:
    async with open_fake(FakeQueen(hives={"localhost": TOLD}), home):
        await command(NodeFlags())
        text = capfd.readouterr().out
        await command(NodeFlags(json=True))
        found = json.loads(capfd.readouterr().out)
        with pytest.raises(NotFoundError, match="no node 'mars'; known: localhost"):
            await command(NodeFlags(node="mars"))
    for told in ("2 s ago", "3", "1.0 GiB", "ready"):
        assert told in text
    assert found in (attrs.asdict(TOLD), [attrs.asdict(TOLD)])


async def test_without_a_queen_an_operators_hive_is_shown(home: Home, capfd: Captured) -> None:
    await hives.show_hive(NodeFlags(json=True))
    assert json.loads(capfd.readouterr().out) == {"node": "localhost", "state": "not running"}
    run_operators_hive(home)
    await hives.list_hives(NodeFlags(json=True))
    (hive,) = json.loads(capfd.readouterr().out)
    assert (hive["hive_id"], hive["pid"]) == ("hive-7", os.getpid())
