from __future__ import annotations

import shlex

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
