from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rbee.testing import tiny_model
from rbee.testing.tiny_model import write_tiny_model


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_bytes_come_out_each_time(tiny: Path, tmp_path: Path) -> None:
    again = contents(write_tiny_model(tmp_path / "deep" / "again"))
    assert again == contents(tiny)
    assert sum(map(len, again.values())) < 1_500_000


def test_every_number_that_it_can_say_is_a_token(tiny: Path) -> None:
    vocabulary = json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(tiny_model.VOCABULARY))
    assert [vocabulary[token] for token in tiny_model.SPECIAL] == [0, 1, 2]


def test_its_greatest_logit_is_never_the_end_or_half_a_character(tiny: Path) -> None:
    from safetensors.numpy import load_file

    head = load_file(tiny / "model.safetensors")["lm_head.weight"]
    vocabulary = json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"]
    silent = {token for token, number in vocabulary.items() if not head[number].any()}
    assert set(tiny_model.SPECIAL) < silent
    assert len(silent) < 300
    assert all(len(token) <= 2 for token in silent - set(tiny_model.SPECIAL))


@pytest.mark.slow
def test_it_is_made_by_hand_with_a_command(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "rbee.testing.tiny_model"]
    target = tmp_path / "model"
    made = subprocess.run([*argv, str(target)], capture_output=True, text=True, check=True)
    assert made.stdout == f"{target}\n"
    assert (target / "config.json").is_file()
    assert tiny_model.main([]) == 2
