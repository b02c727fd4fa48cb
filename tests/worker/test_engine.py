"""An engine is found by its name, our own without a look into all that is installed."""

from __future__ import annotations

import pytest

from rbee.errors import NotFoundError
from rbee.worker import engine
from rbee.worker.engine import engine_kind


def test_an_engine_of_ours_is_found_without_a_look_at_other_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(engine, "entry_points")
    assert engine_kind("echo").name == "echo"


def test_an_engine_that_is_not_installed_is_told_with_those_that_are() -> None:
    with pytest.raises(NotFoundError, match=r"no engine 'nowhere'; installed: .*echo.*vllm"):
        engine_kind("nowhere")
