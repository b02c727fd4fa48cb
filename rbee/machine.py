"""What of this machine decides how a model is run on its CPU, and what memory it has for one."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import attrs

NODES = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")
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


@attrs.frozen
class Memory:
    """Bytes that there are, and that can be had without swapping."""

    total: int
    available: int


def node_memory(cpus: Path = NODES) -> Memory | None:
    """Return the memory beside the first CPU that we may use; None where there are no nodes.

    vLLM's CPU engine takes all its memory from this one NUMA node and none from another.
    """
    first = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    found = next((cpus / f"cpu{first}").glob("node[0-9]*/meminfo"), None)
    if found is None:
        return None
    values = _numbers(found, skip=2)  # `Node 0 MemFree: 5 kB`
    free = ("MemFree:", "Active(file):", "Inactive(file):", "SReclaimable:")
    available = sum(values.get(key, 0) for key in free)
    return Memory(values["MemTotal:"] * 1024, available * 1024)


def cgroup_memory(cgroup: Path = CGROUP) -> Memory | None:
    """Return what our container may have (cgroup v2); None where nothing limits it."""
    try:
        most = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no container, another version, or `max`
        return None
    cached = _numbers(cgroup / "memory.stat").get("inactive_file", 0)
    return Memory(most, max(0, most - used + cached))


def _numbers(path: Path, skip: int = 0) -> dict[str, int]:
    lines = (line.split()[skip:] for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
