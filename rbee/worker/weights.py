"""How much of a model's weights vLLM has taken: counted tensor by tensor where it reads them.

vLLM tells it only as a log line per file, and many a model is one file. So the loader's iterator
is wrapped, in the process that iterates (forked by the worker, which has it wrapped, or spawned:
entry point ``vllm.general_plugins``), and writes the share into a file that the worker reads.
Where vLLM has no such iterator (other load formats, versions to come) nobody knows the share.
"""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

VARIABLE = "RBEE_WEIGHTS_FILE"  # where the share is written; nothing is wrapped without it
SHARE = struct.Struct("d")
OFTEN = 0.1  # seconds between two writes


def register() -> None:
    """Count in a process that vLLM has spawned; nothing outside of rbee's programs."""
    if multiprocessing.parent_process() is not None and os.environ.get("RBEE_NONCE"):
        count_weights()


def count_weights() -> None:
    """Have vLLM's loader in this process, and in those forked from it, write the share."""
    if not os.environ.get(VARIABLE):
        return
    try:
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader as Loader

        if not hasattr(Loader.get_all_weights, "__wrapped__"):
            Loader.get_all_weights = _counting(Loader.get_all_weights)
    except Exception as exc:  # importing it may raise anything; none of it is ours to tell
        log.info("the share of loaded weights will not be known: %s", exc)


def _counting(get_all_weights: Callable[..., Iterable[tuple[str, Any]]]) -> Callable[..., Any]:
    @functools.wraps(get_all_weights)
    def wrapper(loader: Any, config: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        weights = get_all_weights(loader, config, *args, **kwargs)
        total, file = weights_size(Path(config.model)), os.environ.get(VARIABLE)
        return counted(weights, total, Path(file)) if total and file else iter(weights)

    return wrapper


def counted(
    weights: Iterable[tuple[str, Any]], total: int, file: Path
) -> Iterator[tuple[str, Any]]:
    """Pass on ``weights`` and write into ``file`` how much of ``total`` bytes they were."""
    done, due = 0, 0.0
    for name, tensor in weights:
        if (now := time.monotonic()) >= due:
            due = now + OFTEN
            write_share(file, done / total)
        yield name, tensor  # read and copied by the time the next one is asked for
        done += tensor.nbytes
    write_share(file, 1.0)


def weights_size(directory: Path) -> int:
    """Return the bytes of the safetensors files that vLLM reads, 0 if there are none."""
    names = [path.name for path in directory.glob("*.safetensors")]
    with suppress(OSError, ValueError, KeyError, AttributeError):
        index = json.loads((directory / "model.safetensors.index.json").read_bytes())
        names = list(dict.fromkeys(index["weight_map"].values()))
    with suppress(OSError):
        return sum((directory / name).stat().st_size for name in names)
    return 0


def write_share(file: Path, share: float) -> None:
    with suppress(OSError):  # no reason for a model not to load
        # Written over, not anew: a reader must not find it empty.
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, SHARE.pack(min(share, 1.0)), 0)
        finally:
            os.close(fd)


def read_share(file: Path) -> float | None:
    """Return the share, None while no weights are being read."""
    try:
        return float(SHARE.unpack(file.read_bytes())[0])
    except (OSError, struct.error):
        return None
