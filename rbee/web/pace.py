"""When the pieces of an answer come, and what the last ones were."""

from __future__ import annotations

import time
from bisect import bisect_left

from rbee.metrics import Histogram


class Pace:
    """Measures one answer; called for every piece, so it does as little as it can.

    Args:
        began: when the request came, in seconds of `time.monotonic`.
        firsts: takes the seconds from then to the first piece that counts.
        gaps: takes the seconds between two pieces; without both nothing is measured.
        skip: pieces that come before the first that counts.

    Attributes:
        last: when the last piece came; 0.0 before the first.
    """

    __slots__ = ("_before", "_began", "_end", "_firsts", "_gaps", "_skip", "last")

    def __init__(
        self,
        began: float,
        firsts: Histogram | None = None,
        gaps: Histogram | None = None,
        *,
        skip: int = 0,
    ) -> None:
        self._began = began
        self._firsts = firsts
        self._gaps = gaps
        self._skip = skip
        self._before = b""
        self._end = b""
        self.last = 0.0

    def piece(self, data: bytes, now: float) -> None:
        self._before = self._end
        self._end = data
        if (last := self.last) and (gaps := self._gaps) is not None:
            self.last = now
            gap = now - last  # `Histogram.observe`, without the call
            gaps.counts[bisect_left(gaps.bounds, gap)] += 1
            gaps.sum += gap
        else:
            self._begin(now)

    def _begin(self, now: float) -> None:
        if self._firsts is None:
            return
        if self._skip:
            self._skip -= 1
            return
        self._firsts.observe(now - self._began)
        self.last = now

    def rest(self) -> None:
        """Begin anew: what comes next has waited for a client that did not read."""
        if self.last:
            self.last = time.monotonic()

    @property
    def tail(self) -> bytes:
        """The last two pieces."""
        return self._before + self._end
