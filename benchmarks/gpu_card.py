"""The card that is watched: what is in use on it, and how long until it is empty again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import trio

from rbee.gpus import GpuDetail, gpu_details
from rbee.testing.processes import Tree, title_of

MIB = 1 << 20
POLL = 0.005
ENGINES = ("EngineCore", "Worker_TP", "echo-engine")


class Card(Protocol):
    """Something that an engine takes memory of, in bytes; more than ``mark`` if it loads."""

    name: str
    mark: int

    def used(self) -> int: ...

    def facts(self) -> dict[str, Any]: ...


@contextmanager
def open_card(backend: str, index: int) -> Iterator[Card]:
    """Watch one card; NVML stays open, so that the driver stays loaded whoever is measured."""
    if backend == "cpu":
        yield ProcessMemory()
        return
    import pynvml

    pynvml.nvmlInit()
    try:
        yield NvmlCard(pynvml, index)
    finally:
        pynvml.nvmlShutdown()


class NvmlCard:
    """A GPU as NVML counts it, without what the driver keeps for itself."""

    mark = 64 * MIB  # it has a context

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml = nvml
        self._index = index
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        self.name = str(nvml.nvmlDeviceGetName(self._handle))

    def used(self) -> int:
        info = self._nvml.nvmlDeviceGetMemoryInfo(self._handle, version=self._nvml.nvmlMemory_v2)
        return int(info.used)

    def detail(self) -> GpuDetail:
        return next(one for one in gpu_details() if one.index == self._index)

    def facts(self) -> dict[str, Any]:
        seen = self.detail()
        return {
            "card": seen.name, "driver": seen.driver, "total_mib": seen.total // MIB,
            "compute_capability": seen.compute_capability, "cards": len(gpu_details()),
        }  # fmt: skip


class ProcessMemory:
    """For a rehearsal without a GPU: the resident memory of the engines that we started."""

    name = "no card (rehearsal)"
    mark = 0

    def __init__(self) -> None:
        self._tree = Tree(os.getpid())

    def used(self) -> int:
        self._tree.refresh(os.getpid())
        pids = [one.pid for one in self._tree.running()]
        return sum(_resident(pid) for pid in pids if _is_engine(pid))

    def facts(self) -> dict[str, Any]:
        return {"card": self.name, "cards": 0}


def _is_engine(pid: int) -> bool:
    return any(word in title_of(pid) for word in ENGINES)


def _resident(pid: int) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


async def until_back(card: Card, baseline: int, within: float) -> tuple[float, int]:
    """Wait until no more than ``baseline`` is in use; return the seconds and the bytes left."""
    began = trio.current_time()
    while (left := card.used() - baseline) > 0:
        if trio.current_time() - began > within:
            break
        await trio.sleep(POLL)
    return trio.current_time() - began, max(0, left)
