"""What a worker can run on here: the CPU and the GPUs, and the memory that they have."""

from __future__ import annotations

import platform
from pathlib import Path

from rbee.gpus import all_gpus
from rbee.wire.messages import Device


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
