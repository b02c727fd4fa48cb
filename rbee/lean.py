"""What our own programs do not import: half of their start is imports. Never in a host program."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager


def skip_httpx_command() -> None:
    """Let httpx go without its command line, which brings in rich, pygments and click.

    It takes 0.05 to 0.1 s of CPU in each process. Call it before httpx is imported.
    """
    module = types.ModuleType("httpx._main")
    module.main = lambda: None  # type: ignore[attr-defined]
    sys.modules.setdefault(module.__name__, module)


@contextmanager
def no_collecting() -> Iterator[None]:
    """Import in the body without looks for reference cycles, which take a tenth of the time.

    What is there afterwards stays for good, and is not looked at again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
