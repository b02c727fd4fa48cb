"""A process that does not end, not even killed, as one that is stuck in the kernel (state D).

It is held in its exit by us, its tracer, until we let go. Attach and let go in one thread.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17
TRACEEXIT = 0x40
WALL = 0x40000000

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


@contextmanager
def unkillable(pid: int) -> Iterator[None]:
    """Keep a process from ending while the body runs; skip the test where that is not allowed."""
    if libc.ptrace(SEIZE, pid, None, TRACEEXIT):
        pytest.skip(f"ptrace is not allowed here (errno {ctypes.get_errno()})")
    try:
        yield
    finally:
        if libc.ptrace(DETACH, pid, None, None):  # it was not killed: it runs
            libc.ptrace(INTERRUPT, pid, None, None)
            os.waitpid(pid, WALL)
            libc.ptrace(DETACH, pid, None, None)
