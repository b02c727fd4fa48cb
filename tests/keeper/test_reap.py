"""``reap`` ends what the journal of a dead daemon names, and nobody else, however alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rbee import leftovers
from rbee.home import Home
from rbee.keeper.app import run_line
from rbee.sweep import claim
from rbee.testing.processes import LeakCheck
from tests.journal import DEAD, planted, process, write
from tests.trees import NAP, TREE, alive, code, guarded, kill, wait_for
from tests.unkillable import unkillable

pytestmark = pytest.mark.slow

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def dead(home: Home) -> Path:
    """Make the run directory of a daemon that is gone."""
    path = home.run / "h1"
    path.mkdir()
    home.hive_file.write_text("{}")
    return path


def reap(capfd: Captured, *line: str, code: int = 0) -> list[dict[str, Any]]:
    capfd.readouterr()
    assert run_line(["reap", "--json", *line]) == code
    out, err = capfd.readouterr()
    assert ("not end, not even killed" in err) is bool(code)
    rows: list[dict[str, Any]] = json.loads(out)
    return rows


def outcomes(rows: list[dict[str, Any]]) -> list[tuple[str, int | None, str]]:
    return [(row["kind"], row["pid"], row["outcome"]) for row in rows]


def test_nothing_left_is_said_and_no_failure(home: Home, capfd: Captured) -> None:
    for line in (["reap"], ["reap", "--dry-run"], ["reap", "--home", str(home.root / "never")]):
        assert run_line(line) == 0
        assert capfd.readouterr() == ("", "nothing is left of rbee on localhost\n")
    assert not (home.root / "never").exists()


def test_what_the_journal_names_is_told_then_ended(home: Home, dead: Path, capfd: Captured) -> None:
    with planted() as child:
        write(dead, child=process(child), descendants=[DEAD])
        found = reap(capfd, "--dry-run")
        assert outcomes(found) == [
            ("process", child, "found"), ("directory", None, "found"), ("file", None, "found"),
        ]  # fmt: skip
        assert found[0]["memory"] > 1 << 20
        assert found[0]["path"] == str(dead)
        assert alive(child)
        assert run_line(["reap", "--dry-run"]) == 0
        out, err = capfd.readouterr()
        assert "would be ended" in out.splitlines()[1]
        assert err == "a dry run: nothing was ended\n"
        assert [row["outcome"] for row in reap(capfd)] == ["ended"] * 3
        assert not alive(child)
    assert [path.name for path in home.run.iterdir()] == ["hive.lock"]
    assert reap(capfd) == []


def test_a_look_alike_is_neither_told_nor_ended(
    home: Home, dead: Path, nonce: str, capfd: Captured
) -> None:
    """Same program, command line and nonce; one has even a pid that the journal names."""
    with planted() as ours, planted() as alike, planted() as same_pid:
        past = {"pid": same_pid, "start": process(same_pid)["start"] - 1}
        write(dead, nonce=nonce, child=process(ours), descendants=[past])
        assert ("process", ours, "ended") in outcomes(rows := reap(capfd))
        assert [row["pid"] for row in rows if row["kind"] == "process"] == [ours]
        assert (alive(ours), alive(alike), alive(same_pid)) == (False, True, True)


def test_what_a_living_guard_keeps_is_left_alone(home: Home, capfd: Captured) -> None:
    directory = home.run / "h1"
    directory.mkdir()
    with planted() as child, planted() as guard:
        write(directory, child=process(child), guard=process(guard))
        assert reap(capfd) == reap(capfd, "--dry-run") == []
        assert alive(child)


def test_what_has_lost_its_guard_is_ended_in_the_directory_of_a_living_daemon(
    home: Home, nonce: str, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "PATIENCE", 0.2)
    claim(directory := home.run / "h1")
    with planted() as child, planted() as alike, planted() as same_pid:
        past = {"pid": same_pid, "start": process(same_pid)["start"] - 1}
        write(directory, nonce=nonce, child=process(child), descendants=[past])
        assert outcomes(reap(capfd, "--dry-run")) == [("process", child, "found")]
        assert outcomes(reap(capfd)) == [("process", child, "ended")]
        assert (alive(child), alive(alike), alive(same_pid)) == (False, True, True)
    assert directory.is_dir()


def test_a_living_guard_below_a_dead_one_keeps_what_it_has(
    leaks: LeakCheck, capfd: Captured
) -> None:
    claim(directory := leaks.home.run / "h1")
    inner = directory / "w1"
    inner.mkdir()
    with guarded(code(TREE, NAP), leaks, record=str(inner)) as one:
        tree = [one.child, *one.hear()]
        wait_for(lambda: list(inner.glob("*.json")))
        write(directory, child=process(one.pid), descendants=list(map(process, tree)))
        assert reap(capfd) == reap(capfd, "--dry-run") == []
        assert all(map(alive, (one.pid, *tree)))
        one.say("stop\n")
        one.wait()


def test_what_does_not_end_is_told_and_stays_in_the_journal(dead: Path, capfd: Captured) -> None:
    with planted() as stubborn, planted() as child:
        write(dead, child=process(child), descendants=[process(stubborn)])
        with unkillable(child):
            rows = reap(capfd, code=1)
            assert set(outcomes(rows)) == {
                ("process", child, "stuck"), ("process", stubborn, "ended"),
                ("directory", None, "stuck"), ("file", None, "ended"),
            }  # fmt: skip
    assert outcomes(reap(capfd)) == [("directory", None, "ended")]


def test_what_a_guard_cannot_end_is_told_and_left_to_it(
    leaks: LeakCheck, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "PATIENCE", 0.2)
    run_dir = leaks.home.run / "h1"
    run_dir.mkdir()
    with guarded(code(TREE, NAP), leaks, record=str(run_dir)) as one:
        first, *others = one.hear()
        wait_for(lambda: str(first) in "".join(p.read_text() for p in run_dir.glob("*.json")))
        assert reap(capfd) == []
        with unkillable(first):
            kill(one.child)
            wait_for(lambda: not any(map(alive, others)))
            assert outcomes(reap(capfd, "--dry-run")) == [("process", first, "ending")]
            assert outcomes(reap(capfd, code=1)) == [("process", first, "stuck")]
            assert alive(one.pid)
        one.wait()
