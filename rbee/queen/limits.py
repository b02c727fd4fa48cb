"""How much one queen takes at once; beyond that it refuses politely."""

from __future__ import annotations

import attrs

from rbee.errors import UsageError

WAITING = 256  # requests for one model; some seconds' work of a worker
LONGEST_NAME = 4096  # characters of a model's; as paths
WAITING_SIZE = 256 << 20  # bytes; a prompt of 128 k tokens has about half a megabyte


@attrs.frozen
class Limits:
    """Bounds of one queen.

    Attributes:
        slots: requests that one worker gets at once; None leaves it to what its engine can do.
        waiting: requests that wait, for their body to come or for a worker, of all models.
        waiting_per_model: those that wait for workers of one model.
        waiting_size: bytes of the bodies of those that wait for a worker; those whose bodies are
            being read may hold as much again, and at least one of the greatest.
    """

    slots: int | None = attrs.field(default=None)
    waiting: int = 1024
    waiting_per_model: int = WAITING
    waiting_size: int = WAITING_SIZE

    @slots.validator
    def _check(self, attribute: object, slots: int | None) -> None:
        if slots is not None and slots < 1:
            raise UsageError(f"--slots must be at least 1: {slots}")
