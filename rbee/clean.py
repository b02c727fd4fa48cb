"""How long the last end of something took: from its order until nothing of it was left."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from rbee.metrics import counter, gauge

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


@attrs.define(eq=False)
class Clean:
    """The ends of all things of one sort: ``what`` in words."""

    what: str
    seconds: float = 0.0
    count: int = 0

    def note(self, since: float) -> None:
        """Note one that was ordered, or came unasked, at ``since`` (`time.monotonic`)."""
        self.seconds = time.monotonic() - since
        self.count += 1

    def collect(self, component: str) -> Iterable[Metric]:
        """Make their figures; ``component`` stands in the names."""
        yield gauge(
            f"rbee_{component}_last_clean_seconds",
            f"From the end of a {self.what} until nothing of it was left, the last time.",
            self.seconds,
        )
        yield counter(
            f"rbee_{component}_cleans_total",
            f"Ends of a {self.what} after which nothing of it was left.",
            self.count,
        )
