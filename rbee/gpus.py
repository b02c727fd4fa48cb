"""The NVIDIA GPUs of this machine and what is free on them, through NVML: no CUDA context.

NVML numbers the cards by PCI bus, CUDA by speed unless ``CUDA_DEVICE_ORDER`` says otherwise;
workers get it (`rbee.worker.vllm_plan.environment`), so that an index means one card everywhere.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import attrs

from rbee.errors import BadInputError

T = TypeVar("T")


@attrs.frozen
class Gpu:
    """One card; memory in bytes."""

    index: int
    name: str
    total: int
    free: int


@attrs.frozen
class GpuProcess:
    """A process with a context on a card; ``used`` bytes, None where the driver does not tell."""

    pid: int
    used: int | None


@attrs.frozen
class GpuDetail:
    """What NVML tells of one card; memory in bytes, without what the driver reserves.

    ``compute_capability`` is such as ``9.0``. ``processes`` may be empty in a container, whose
    driver tells of none.
    """

    index: int
    name: str
    uuid: str
    driver: str
    compute_capability: str
    total: int
    used: int
    processes: tuple[GpuProcess, ...]


def gpu_details() -> list[GpuDetail]:
    """Describe the cards of this machine that NVML tells of."""
    return _all(_detail)


@attrs.frozen
class Usage:
    """What is in use on one card: bytes in all, and by each process that NVML shows.

    In a container those may be nobody, or have pids that mean nothing there.
    """

    index: int
    used: int
    by_pid: dict[int, int] = attrs.field(factory=dict)


def all_gpus() -> list[Gpu]:
    """List the cards of this machine that NVML tells of.

    None where there is no driver or no ``nvidia-ml-py``; not one that has fallen off the bus.
    """
    return _all(_gpu)


def visible_gpus() -> list[str]:
    """Return the names under which CUDA shows its devices, in the order of our indices."""
    masked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if masked is not None:
        return [name.strip() for name in masked.split(",") if name.strip()]
    return [str(index) for index in range(gpu_count())]


def gpu_count() -> int:
    with _nvml() as nvml:
        return 0 if nvml is None else int(nvml.nvmlDeviceGetCount())


def chosen_gpus(device: str) -> list[Gpu]:
    """Return the cards that ``--device`` names; none where NVML does not tell of one of them."""
    return _chosen(device, _gpu)


def usage(device: str) -> list[Usage]:
    """Return what is in use on the cards that ``--device`` names; none where NVML is silent."""
    return _chosen(device, _usage)


def device_indices(device: str) -> list[int]:
    """Read ``0`` or ``0,1``."""
    parts = device.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise BadInputError(
            f"--device takes indices such as 0 or 0,1: {device!r}", hint="rbee-hive detect"
        )
    found = [int(part) for part in parts]
    if len(set(found)) != len(found):
        raise BadInputError(f"--device names a device twice: {device!r}", hint="rbee-hive detect")
    return found


@contextmanager
def _nvml() -> Generator[Any, None, None]:
    """Open NVML; None where there is no driver, no card or no package for it."""
    if importlib.util.find_spec("pynvml") is None:
        yield None
        return
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _handle(nvml: Any, name: str) -> Any:
    """Take a name as ``CUDA_VISIBLE_DEVICES`` has it: an index, or the UUID of a card or slice."""
    if name.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)


def _all(describe: Callable[[Any, int, Any], T]) -> list[T]:
    with _nvml() as nvml:
        if nvml is None:
            return []
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            with suppress(nvml.NVMLError):
                found.append(describe(nvml, index, nvml.nvmlDeviceGetHandleByIndex(index)))
        return found


def _chosen(device: str, describe: Callable[[Any, int, Any], T]) -> list[T]:
    visible, indices = visible_gpus(), device_indices(device)
    with _nvml() as nvml:
        if nvml is None or max(indices) >= len(visible):
            return []
        try:
            return [describe(nvml, index, _handle(nvml, visible[index])) for index in indices]
        except nvml.NVMLError:
            return []


def _gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    # The v2 struct: v1 counts what the driver reserves as used, even on an empty card.
    info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    return Gpu(index, str(nvml.nvmlDeviceGetName(handle)), int(info.total), int(info.free))


def _detail(nvml: Any, index: int, handle: Any) -> GpuDetail:
    info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return GpuDetail(
        index=index,
        name=str(nvml.nvmlDeviceGetName(handle)),
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        driver=str(nvml.nvmlSystemGetDriverVersion()),
        compute_capability=f"{major}.{minor}",
        total=int(info.total),
        used=int(info.used),
        processes=tuple(
            GpuProcess(int(one.pid), one.usedGpuMemory) for one in _running(nvml, handle)
        ),
    )


def _usage(nvml: Any, index: int, handle: Any) -> Usage:
    info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    by_pid = {int(one.pid): int(one.usedGpuMemory or 0) for one in _running(nvml, handle)}
    return Usage(index, int(info.used), by_pid)


def _running(nvml: Any, handle: Any) -> list[Any]:
    try:
        return list(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except nvml.NVMLError:  # not for this card, or not for us
        return []
