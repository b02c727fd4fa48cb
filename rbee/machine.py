"""What of this machine decides how a model is run on its CPU."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import attrs

BF16_FLAGS = {"avx512_bf16", "amx_bf16"}  # without them bf16 has no fast kernel: 2.8 times dearer


@attrs.frozen
class Machine:
    """The CPU: its flags, its physical cores that we may use, its architecture."""

    cpu_flags: frozenset[str]
    cores: int
    architecture: str


def this_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    flags: set[str] = set()
    cores = set()
    package = ""
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "flags":
            flags.update(value.split())
        elif key == "physical id":
            package = value
        elif key == "core id":
            cores.add((package, value))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(len(cores) or 1 << 16, usable or 1)
    return Machine(frozenset(flags), count, platform.machine())


def threads(machine: Machine) -> int:
    """One core stays free: when another process takes one, OpenMP loses 90 % of its speed."""
    return max(1, machine.cores - 1)


def cpu_dtype(machine: Machine) -> str:
    """Return the dtype to compute in on this CPU, where nobody asks for one."""
    is_x86 = machine.architecture in ("x86_64", "AMD64")
    return "float32" if is_x86 and not machine.cpu_flags & BF16_FLAGS else "auto"
