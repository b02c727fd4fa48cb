"""GPUs are what NVML tells, with a stand-in for it: there is none where the tests run."""
# ruff: noqa: N802, N815  (the names are those of NVML)

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rbee.devices import devices
from rbee.errors import BadInputError
from rbee.gpus import (
    Gpu,
    Usage,
    all_gpus,
    chosen_gpus,
    device_indices,
    gpu_count,
    usage,
    visible_gpus,
)
from rbee.hive.detect import detect

RESERVED = 480 << 20  # what the driver keeps for itself on an empty card
GIB = 1 << 30


class NVMLError(Exception):
    pass


class FakeNvml(ModuleType):
    """Cards by PCI bus: an empty one, and one of which 30 GiB are used."""

    nvmlMemory_v2 = 2
    NVMLError = NVMLError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.__spec__ = ModuleSpec("pynvml", None)
        self.used = [0, 30 * GIB]
        self.processes: list[dict[int, int | None]] = [{}, {}]
        self.opened = 0
        self.has_driver = True

    def nvmlInit(self) -> None:
        if not self.has_driver:
            raise NVMLError
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.used)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self.used):
            raise NVMLError
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if not uuid.startswith("GPU-"):
            raise NVMLError
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"card {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:
        hidden = 0 if version == self.nvmlMemory_v2 else RESERVED
        total, used = 80 * GIB, self.used[handle]
        return SimpleNamespace(total=total, free=total - used - hidden, used=used + hidden)

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        if handle >= len(self.processes):
            raise NVMLError
        found = self.processes[handle].items()
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in found]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_what_the_driver_reserves_is_not_counted_as_used(nvml: FakeNvml) -> None:
    assert all_gpus() == [
        Gpu(0, "card 0", 80 * GIB, 80 * GIB), Gpu(1, "card 1", 80 * GIB, 50 * GIB),
    ]  # fmt: skip
    assert nvml.opened == 0


def test_detect_lists_the_same_cards(nvml: FakeNvml) -> None:
    cpu, *cards = devices()
    assert cpu.backend == "cpu"
    assert [(d.backend, d.index, d.memory_free) for d in cards] == [
        ("cuda", 0, 80 * GIB), ("cuda", 1, 50 * GIB),
    ]  # fmt: skip


def test_detect_tells_driver_capability_and_processes(nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.processes[1] = {7: 30 * GIB}
    empty, used = detect(tmp_path)["gpus"]
    assert (empty["used"], empty["processes"]) == (0, ())
    assert (used["driver"], used["compute_capability"]) == ("580.1", "9.0")
    assert used["processes"] == ({"pid": 7, "used": 30 * GIB},)
    assert nvml.opened == 0


def test_an_index_is_one_of_the_visible_cards(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [gpu.name for gpu in chosen_gpus("1,0")] == ["card 1", "card 0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1, 0")
    assert visible_gpus() == ["GPU-1", "0"]
    assert [(gpu.index, gpu.name) for gpu in chosen_gpus("0")] == [(0, "card 1")]


def test_what_is_in_use_is_told_by_card_and_by_process(nvml: FakeNvml) -> None:
    nvml.processes[1] = {12: 25 * GIB, 13: None}  # None: the driver does not tell how much
    assert usage("1,0") == [Usage(1, 30 * GIB, {12: 25 * GIB, 13: 0}), Usage(0, 0)]
    nvml.processes.pop()  # nor who
    assert usage("1") == [Usage(1, 30 * GIB)]
    nvml.has_driver = False
    assert usage("0") == []


@pytest.mark.parametrize("masked", ["", "MIG-1", "7"])
def test_a_card_that_nvml_does_not_know_tells_nothing(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, masked: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", masked)
    assert chosen_gpus("0") == []
    assert nvml.opened == 0


def test_without_a_driver_there_are_no_gpus(nvml: FakeNvml) -> None:
    nvml.has_driver = False
    assert (all_gpus(), chosen_gpus("0"), visible_gpus(), gpu_count()) == ([], [], [], 0)


@pytest.mark.parametrize("device", ["x", "1,1", "", "-1"])
def test_a_device_is_an_index_or_several(device: str) -> None:
    with pytest.raises(BadInputError, match="--device"):
        device_indices(device)
