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
    for info in sorted(known, key=lambda info: info.last_used):
        is_old = unused_for is not None and now - info.last_used > unused_for
        is_too_much = max_size is not None and total > max_size
        if not info.in_use and (is_old or is_too_much):
            chosen.append(info)
            total -= info.size
    return chosen
