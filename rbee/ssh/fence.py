"""When a node that fell silent is certainly clean again: our last word, plus its lease."""

from __future__ import annotations

import attrs
import trio

KILLING = 8.0  # seconds that the guards need once the lease is over


@attrs.define(eq=False)
class Fence:
    """What one connection may have left running on its node.

    Attributes:
        last_beat: when the last beat was written, in trio's time; 0.0 before the first.
        closed: when the connection was closed or reset; 0.0 while it is open.
        lease: the longest lease of what was started.
    """

    last_beat: float = 0.0
    closed: float = 0.0
    lease: float = 0.0
    _running: int = 0

    @property
    def is_up(self) -> bool:
        """Whether something was started whose end nobody has confirmed."""
        return self._running > 0

    @property
    def lifted_at(self) -> float:
        """When nothing of it can be left, in trio's time; 0.0: now."""
        if not self.is_up:
            return 0.0
        return max(self.last_beat, self.closed) + self.lease + KILLING

    def note_start(self, lease: float) -> None:
        self._running += 1
        self.lease = max(self.lease, lease)

    def note_end(self) -> None:
        """Note that the outermost guard has told its end: nothing is left below it."""
        self._running -= 1

    def note_beat(self) -> None:
        self.last_beat = trio.current_time()

    def note_closed(self) -> None:
        self.closed = trio.current_time()
