from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from rbee import hints
from rbee.hints import infer, logs_of
from rbee.model import LOCALHOST
from tests.programs import KEEPER


def test_a_command_that_is_suggested_runs_as_it_stands() -> None:
    line = infer("--max-tokens", 64, model="my model", prompt="it's")
    program, *words = shlex.split(line)
    assert program == "rbee-keeper"
    values = {"--max-tokens": 64, "--model": "my model", "--prompt": "it's"}
    assert {flag: KEEPER.parse(words, flag) for flag in values} == values


def test_a_workers_log_is_looked_for_on_its_node() -> None:
    _, *words = logs_of("w", "mac").split()
    assert {flag: KEEPER.parse(words, flag) for flag in ("--worker", "--node")} == {
        "--worker": "w", "--node": "mac",
    }  # fmt: skip
    assert logs_of("w", LOCALHOST) == "rbee-keeper logs --worker w"


@pytest.mark.parametrize("tree", [Path("/my src/rbee"), None])
def test_rbee_is_never_asked_of_an_index(
    monkeypatch: pytest.MonkeyPatch, tree: Path | None
) -> None:
    monkeypatch.setattr(hints, "source_tree", lambda: tree)
    directory = Path("/my wheels")
    commands = [hints.install("cpu"), hints.download_rbee(directory, "cpu", then="true")]
    for words in (shlex.split(command, comments=True) for command in commands):
        assert ("/my src/rbee[cpu]" if tree else ".[cpu]") in words
        assert hints.TORCH_CPU_INDEX in words
        assert not any(word.startswith("rbee") for word in words)
    assert shlex.split(hints.install(), comments=True)[:4] == [
        sys.executable,
        "-m",
        "pip",
        "install",
    ]


def test_paths_are_quoted() -> None:
    assert hints.ls(Path("/my dir"), "-l") == "ls -l '/my dir'"
    assert hints.pull("/my dir") == "rbee-keeper model pull '/my dir'"
