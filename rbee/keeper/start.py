"""From the flags that say how a worker is started to the fields that requests have."""

from __future__ import annotations

import re
from typing import Any

from rbee.errors import BadInputError
from rbee.keeper.flags import StartFlags
from rbee.model import node_name

_ENGINE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_DEVICE = re.compile(r"\d{1,4}(,\d{1,4})*")
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,3})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_TIME = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*(s|m|h|d)?", re.IGNORECASE)
_ENGINE_ARG = re.compile(r"(?:--)?([A-Za-z][A-Za-z0-9._-]{0,99})(?:=(.*))?", re.DOTALL)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def start_settings(flags: StartFlags) -> dict[str, Any]:
    """Return what `TaskRequest` and `StartWorker` have in common.

    Raises:
        BadInputError: a value that no queen would take.
    """
    _check_placement(flags)
    for name in ("max_model_len", "max_num_seqs"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise BadInputError(
                f"--{flag} must be at least 1, got {value}",
                hint=f"rbee-keeper infer --{flag} 16 …",
            )
    return {
        "node": flags.node,
        "backend": flags.backend,
        "device": flags.device,
        "engine": flags.engine,
        "max_model_len": flags.max_model_len,
        "dtype": flags.dtype,
        "kv_cache_bytes": None if flags.kv_cache is None else size(flags.kv_cache),
        "max_num_seqs": flags.max_num_seqs,
        "engine_args": engine_args(flags.engine_arg),
        "keep_alive": None if flags.keep_alive is None else seconds(flags.keep_alive),
    }


def size(text: str) -> int:
    """Read a size in bytes: ``268435456``, ``256M``, ``1.5GiB``; units are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    found = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not found:
        raise BadInputError(
            f"{text!r} is not a size (needed: bytes above 0, or a number with K, M, G or T)",
            hint="rbee-keeper infer --kv-cache 512M …",
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
            hint="rbee-keeper infer --keep-alive 10m …",
        )
    return float(match[1]) * _SECONDS[(match[2] or "s").lower()]


def engine_args(given: tuple[str, ...]) -> dict[str, str]:
    """Read ``key=value`` options; a bare ``key`` is a switch. The engine itself checks them."""
    found: dict[str, str] = {}
    for text in given:
        match = _ENGINE_ARG.fullmatch(text)
        if not match:
            raise BadInputError(
                f"{text!r} is not an option of an engine (needed: key=value)",
                hint="rbee-keeper infer --engine-arg gpu-memory-utilization=0.5 …",
            )
        found[match[1].replace("_", "-")] = "true" if match[2] is None else match[2]
    return found


def _check_placement(flags: StartFlags) -> None:
    if flags.node is not None:
        node_name(flags.node)
    if flags.engine is not None and not _ENGINE.fullmatch(flags.engine):
        raise BadInputError(
            f"{flags.engine!r} is not an engine's name", hint="rbee-keeper infer --engine vllm …"
        )
    if flags.device is not None and not _DEVICE.fullmatch(flags.device):
        raise BadInputError(
            f"--device must be an index or several with commas between, got {flags.device!r}",
            hint="rbee-keeper infer --device 0,1 …",
        )
