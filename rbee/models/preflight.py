"""Is there room? Asked before something is fetched, written or loaded, not found out half-way."""

from __future__ import annotations

import os
from pathlib import Path

from rbee.errors import InsufficientError
from rbee.units import human

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
# an engine's own memory beside weights and cache: the interpreter, torch, activations
OVERHEAD = 800 * 2**20
MEMINFO = Path("/proc/meminfo")


def check_disk(path: Path, required: int, *, what: str = "the model") -> None:
    """Raise `InsufficientError` unless the file system of ``path`` has ``required`` bytes free."""
    available = free_disk(path)
    if available < required:
        raise InsufficientError(
            f"not enough disk for {what}: needed {human(required)}, "
            f"free {human(available)} at {path}",
            code="insufficient_disk",
            hint="rbee-keeper model list   # then rbee-keeper model rm MODEL",
            required=required,
            available=available,
        )


def check_memory(required: int, *, what: str = "the model", available: int | None = None) -> None:
    """Raise `InsufficientError` unless ``required`` bytes of memory are to be had.

    ``available`` defaults to what the kernel can give without swapping; where it does not tell,
    nothing is refused.
    """
    if available is None:
        available = available_memory()
    if available is not None and available < required:
        raise InsufficientError(
            f"not enough memory for {what}: needed {human(required)}, available {human(available)}",
            code="insufficient_memory",
            hint="rbee-keeper worker stop --all   # gives back the memory that they hold",
            required=required,
            available=available,
        )


def free_disk(path: Path) -> int:
    """Return the bytes that an ordinary user may still write at ``path``, existing or not."""
    there = next(place for place in (path, *path.parents) if place.exists())
    found = os.statvfs(there)
    return found.f_bavail * found.f_frsize


def available_memory(path: Path = MEMINFO) -> int | None:
    """Return MemAvailable in bytes; None where the kernel does not tell."""
    return meminfo("MemAvailable", path)


def meminfo(key: str, path: Path = MEMINFO) -> int | None:
    """Return one figure of the kernel's account of the memory, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
