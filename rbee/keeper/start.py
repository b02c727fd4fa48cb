"""From the flags that say how a worker is started to the fields that requests have."""

from __future__ import annotations

import json
import re
from typing import Any

from rbee.errors import BadInputError
from rbee.hints import infer
from rbee.keeper.flags import QueenFlags, StartFlags
from rbee.model import DEFAULT_ENGINE, node_name
from rbee.models.access import read_access
from rbee.running import is_loopback
from rbee.units import seconds, size

_ENGINE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_DEVICE = re.compile(r"\d{1,4}(,\d{1,4})*")
_ENGINE_ARG = re.compile(r"(?:--)?([A-Za-z][A-Za-z0-9._-]{0,99}\+?)(?:=(.*))?", re.DOTALL)


def start_settings(flags: StartFlags) -> dict[str, Any]:
    """Return what `TaskRequest` and `StartWorker` have in common; our way to a hub goes along.

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
                hint=infer(f"--{flag}", 16),
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
        "hub": read_access(is_ours=is_ours(flags)),
    }


def is_ours(flags: QueenFlags) -> bool:
    """Tell whether the queen that is asked is this machine's."""
    return not flags.queen_url or is_loopback(flags.queen_url)


def engine_args(given: tuple[str, ...]) -> dict[str, str]:
    """Read ``key=value`` options; a bare ``key`` is a switch. The engine itself checks them."""
    found: dict[str, str] = {}
    for text in given:
        match = _ENGINE_ARG.fullmatch(text)
        if not match:
            raise BadInputError(
                f"{text!r} is not an option of an engine (needed: key=value)",
                hint=infer("--engine-arg", "gpu-memory-utilization=0.5"),
            )
        key, value = _engine_key(match[1]), "true" if match[2] is None else match[2]
        if key in found:
            both = json.dumps([found[key], value])
            raise BadInputError(
                f"--engine-arg {key} is given twice",
                hint=f"{infer('--engine-arg', f'{key}={both}')}   # if it is a list",
            )
        found[key] = value
    return found


def _engine_key(key: str) -> str:
    """Write a name with hyphens; what follows a dot is a key of the option's own."""
    name, dot, rest = key.partition(".")
    return name.replace("_", "-") + dot + rest


def _check_placement(flags: StartFlags) -> None:
    if flags.node is not None:
        node_name(flags.node)
    if flags.engine is not None and not _ENGINE.fullmatch(flags.engine):
        raise BadInputError(
            f"{flags.engine!r} is not an engine's name", hint=infer("--engine", DEFAULT_ENGINE)
        )
    if flags.device is not None and not _DEVICE.fullmatch(flags.device):
        raise BadInputError(
            f"--device must be an index or several with commas between, got {flags.device!r}",
            hint=infer("--device", 0),
        )
