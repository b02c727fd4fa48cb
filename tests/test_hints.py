from __future__ import annotations

import shlex

from rbee.hints import infer
from tests.programs import KEEPER


def test_a_command_that_is_suggested_runs_as_it_stands() -> None:
    line = infer("--max-tokens", 64, model="my model", prompt="it's")
    program, *words = shlex.split(line)
    assert program == "rbee-keeper"
    values = {"--max-tokens": 64, "--model": "my model", "--prompt": "it's"}
    assert {flag: KEEPER.parse(words, flag) for flag in values} == values
