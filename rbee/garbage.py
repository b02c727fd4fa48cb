"""How often Python looks for reference cycles, in a program that is ours."""

from __future__ import annotations

import gc

YOUNG = 20_000  # new objects between two looks at them; 700 as Python has it


def collect_rarely() -> None:
    """Look rarely, and never again at what is there now.

    A full look stops every stream for as long as all objects take, tens of milliseconds with
    thousands of streams; cycles are few here, and what is no cycle goes at once all the same.
    """
    gc.freeze()
    gc.set_threshold(YOUNG, 20, 50)
