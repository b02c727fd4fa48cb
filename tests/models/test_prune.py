from __future__ import annotations

import pytest

from rbee.models.prune import choose_unneeded
from rbee.wire.messages import ModelInfo

NOW = 1000.0


def info(name: str, last_used: float, size: int = 10, **more: object) -> ModelInfo:
    return ModelInfo(name, name, "localhost", "", size=size, last_used=last_used, **more)


MODELS = [info("new", 990), info("old", 100), info("used", 50, in_use=True), info("older", 60)]


@pytest.mark.parametrize(
    ("unused_for", "max_size", "gone"),
    [
        (None, None, ""),
        (500, None, "older old"),
        (0, None, "older old new"),
        (None, 40, ""),
        (None, 39, "older"),
        (None, 20, "older old"),
        (None, 1, "older old new"),
        (920, 35, "older"),
        (920, 25, "older old"),
    ],
)
def test_the_least_recently_used_go_until_both_bounds_hold(
    unused_for: float | None, max_size: int | None, gone: str
) -> None:
    chosen = choose_unneeded(MODELS, NOW, unused_for=unused_for, max_size=max_size)
    assert " ".join(model.name for model in chosen) == gone
