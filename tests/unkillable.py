"""A process that does not end, not even killed, as one that is stuck in the kernel (state D).

It is held in its exit by us, its tracer, until we let go. Attach and let go in one thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

SEIZE, DETACH, TRACEEXIT = 0x4206, 17, 0x40

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
        libc.ptrace(DETACH, pid, None, None)
