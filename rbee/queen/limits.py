"""How much one queen takes at once; beyond that it refuses politely."""

from __future__ import annotations

import attrs

from rbee.errors import UsageError

WAITING = 256  # requests for one model; some seconds' work of a worker


@attrs.frozen
class Limits:
    """Bounds of one queen.

    Attributes:
        slots: requests that one worker gets at once; None leaves it to what its engine can do.
        waiting: requests that wait, for their body to come or for a worker, of all models.
        waiting_per_model: those that wait for workers of one model.
    """

    slots: int | None = attrs.field(default=None)
    waiting: int = 1024
    waiting_per_model: int = WAITING

    @slots.validator
    def _check(self, attribute: object, slots: int | None) -> None:
        if slots is not None and slots < 1:
            raise UsageError(f"--slots must be at least 1: {slots}")
