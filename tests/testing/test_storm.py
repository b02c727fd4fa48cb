"""A storm's choices, its sums, and a short one."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.errors import BadInputError, ConflictError
from rbee.model import LOCALHOST
from rbee.testing.blows import PowerLoss, Signal
from rbee.testing.faults import FAULTS, NEED_NAMESPACES, Fault
from rbee.testing.hosts import why_no_hosts
from rbee.testing.rounds import MAX_NODES, MAX_WORKERS, MOMENTS, NEED_WORKER, NEW, draw_round
from rbee.testing.storm import NODES, chosen
from rbee.testing.tally import Tally, percentile, resumed

SEEDS = 1000
FIXED_SEED = 3542
FIXED_SECONDS, RANDOM_SECONDS = 120, 50  # in which rounds begin, as many as the machine does


# choices ----------------------------------------------------------------------------------------
@given(st.integers(0, 1 << 40), st.sets(st.sampled_from(list(FAULTS)), min_size=1).map(sorted))
def test_a_seed_makes_one_choice_which_can_be_had(seed: int, faults: list[str]) -> None:
    one = draw_round(seed, NODES, faults)
    assert one == draw_round(seed, NODES, faults)
    assert one.fault.name in faults
    assert 1 <= len(one.nodes) == len(set(one.nodes)) <= MAX_NODES
    assert set(one.nodes) <= {*NODES, LOCALHOST}
    assert set(one.nodes) & set(NODES)
    assert set(one.workers) <= set(one.nodes)
    assert len(one.workers) <= MAX_WORKERS
    assert one.node in one.nodes
    for blow in one.fault.blows:
        assert blow.node in (*one.nodes, LOCALHOST)


def test_whoever_is_hit_is_there_to_be_hit() -> None:
    for seed in range(SEEDS):
        one = draw_round(seed, NODES, ["KILL"])
        (blow,) = one.fault.blows
        if blow.role in NEED_WORKER and one.moment not in NEW:
            assert blow.node in one.workers


def test_every_fault_comes_at_every_moment() -> None:
    rounds = [draw_round(seed, NODES, tuple(FAULTS)) for seed in range(SEEDS)]
    assert {(one.fault.name, one.moment) for one in rounds} == {
        (fault, moment) for fault in FAULTS for moment in MOMENTS
    }


def test_where_all_who_would_clean_are_killed_the_next_daemon_sweeps() -> None:
    def killed(*places: tuple[str, str]) -> set[str]:
        return Fault("", tuple(Signal(SIGKILL, *place) for place in places)).unswept

    assert killed(("guard A", "n1"), ("guard B", "n1")) == {"n1"}
    assert killed(("guard A", "n1"), ("guard B", "n2")) == set()
    assert killed(("guard A", LOCALHOST), ("guard B", LOCALHOST)) == set()
    assert killed(("keeper", LOCALHOST), ("queen guard", LOCALHOST)) == {LOCALHOST}
    assert Fault("", (PowerLoss("n1"),)).unswept == {"n1"}


def test_faults_are_chosen_by_pattern() -> None:
    assert chosen("*", can_cut=True) == tuple(FAULTS)
    assert chosen("KILL, *KILLs", can_cut=True) == ("KILL", "two KILLs", "three KILLs")
    assert set(chosen("*", can_cut=False)) == set(FAULTS) - NEED_NAMESPACES
    with pytest.raises(BadInputError, match="no fault is called 'flood'"):
        chosen("KILL,flood", can_cut=True)
    with pytest.raises(BadInputError, match="namespaces"):
        chosen("partition", can_cut=False)


# sums -------------------------------------------------------------------------------------------
@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_one_of_the_values_and_enough_do_not_exceed_it(
    values: list[float], share: float
) -> None:
    found = percentile(sorted(values), share)
    assert found in values
    not_above = sum(value <= found for value in values) / len(values)
    below = sum(value < found for value in values) / len(values)
    assert not_above >= share - 1e-9
    assert below < share + 1e-9


def test_a_storm_goes_on_where_its_file_ends(tmp_path: Path) -> None:
    file, tally = tmp_path / "storm.json", Tally(7, "abc", "echo")
    tally.note("KILL", 0.25)
    tally.note("KILL", None)
    tally.note("STOP", 3.5)
    tally.note_failure(True, seed=9, what="something")
    tally.save(file)
    told = json.loads(file.read_text())
    assert (told["rounds"], told["leaks"], told["seed"], told["commit"]) == (3, 1, 7, "abc")
    assert told["faults"]["STOP"] == {"n": 1, "p50": 3.5, "p99": 3.5, "max": 3.5, "seconds": [3.5]}
    assert told["failures"] == [{"leak": True, "seed": 9, "what": "something"}]
    again = resumed(file, "abc", "echo")
    assert again == tally
    again.note("KILL", 0.5)
    assert again.as_json()["faults"]["KILL"]["n"] == 2


def test_a_storm_goes_on_only_with_its_own_commit(tmp_path: Path) -> None:
    file = tmp_path / "storm.json"
    Tally(7, "abc", "echo").save(file)
    for commit, engine in [("def", "echo"), ("abc", "vllm")]:
        with pytest.raises(ConflictError, match=f"abc with echo, .* {commit} with {engine}"):
            resumed(file, commit, engine)
    file.write_text("[]")
    with pytest.raises(BadInputError, match="no storm to go on with"):
        resumed(file, "abc", "echo")


# a storm ----------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    ("seed", "seconds"),
    [(FIXED_SEED, FIXED_SECONDS), (secrets.randbelow(1 << 31), RANDOM_SECONDS)],
    ids=["fixed", "random"],
)
def test_nothing_is_left_by_a_storm(seed: int, seconds: int, tmp_path: Path) -> None:
    """Three minutes in all; a failure tells the seed, and the command that repeats its round."""
    if why := why_no_hosts():
        pytest.skip(why)
    file = tmp_path / "storm.json"
    argv = [sys.executable, "-m", "rbee.testing.storm", "--seed", str(seed), "--json", str(file)]
    done = subprocess.run(
        [*argv, "--rounds", "999", "--limit", str(seconds)],
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}{done.stdout}"
    told = json.loads(file.read_text())
    assert (told["seed"], told["leaks"], told["failures"]) == (seed, 0, [])
    assert 1 <= told["rounds"] < 999


@pytest.mark.slow
@pytest.mark.alone
def test_a_storm_that_is_ended_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    if why := why_no_hosts():
        pytest.skip(why)
    argv = [sys.executable, "-m", "rbee.testing.storm", "--seed", str(FIXED_SEED), "--rounds", "99"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as popen:
        assert popen.stdout is not None
        assert popen.stderr is not None
        said = b""
        while b"round --seed" not in said:
            line = popen.stderr.readline()
            assert line, said
            said += line
        popen.terminate()
        out, err = popen.communicate(timeout=60)
    assert popen.returncode == 130, (out, err)
    assert b"interrupted" in err
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []
