"""Which models to remove for space: a pure choice over what the catalog tells."""

from __future__ import annotations

from collections.abc import Iterable

from rbee.wire.messages import ModelInfo


def choose_unneeded(
    infos: Iterable[ModelInfo], now: float, *, unused_for: float | None, max_size: int | None
) -> list[ModelInfo]:
    """Return what is to go, least recently used first; never what a worker has.

    Afterwards nothing is left that was not used for ``unused_for`` seconds, and all together have
    at most ``max_size`` bytes; None sets no bound.
    """
    known = list(infos)
    total = sum(info.size for info in known)
    chosen = []
    for info in sorted(known, key=last_use):
        is_old = unused_for is not None and now - last_use(info) > unused_for
        is_too_much = max_size is not None and total > max_size
        if not info.in_use and (is_old or is_too_much):
            chosen.append(info)
            total -= info.size
    return chosen


def last_use(info: ModelInfo) -> float:
    """Return when a model was last needed; fetching it counts."""
    return max(info.last_used, info.created)
