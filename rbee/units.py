"""Sizes and times as people write them."""

from __future__ import annotations

import re

from rbee.errors import BadInputError
from rbee.hints import infer

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,3})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_TIME = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*(s|m|h|d)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def size(text: str, *, hint: str = infer("--kv-cache", "512M")) -> int:
    """Read a size in bytes: ``268435456``, ``256M``, ``1.5GiB``; units are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    found = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not found:
        raise BadInputError(
            f"{text!r} is not a size (needed: bytes above 0, or a number with K, M, G or T)",
            hint=hint,
        )
    return found


def seconds(text: str) -> float:
    """Read a time: ``300``, ``10m``, ``2h``; a negative one is for ever and becomes -1."""
    if re.fullmatch(r"-\d{1,9}(\.\d{1,6})?[smhd]?", text.strip()):
        return -1.0
    match = _TIME.fullmatch(text.strip())
    if not match:
        raise BadInputError(
            f"{text!r} is not a time (needed: seconds, or a number with s, m, h or d; "
            "-1 is for ever)",
            hint=infer("--keep-alive", "10m"),
        )
    return float(match[1]) * _SECONDS[(match[2] or "s").lower()]


def human(size: float) -> str:
    """Write a number of bytes for people: ``1.3 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
