"""What Triton compiles with is chosen before it compiles anything."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from rbee.worker import compilers
from rbee.worker.compilers import choose_tools, hash_sources


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for PyTorch's module, whose own build for CPUs has nothing to choose."""
    parts = compilers.TASKS.split(".")
    for count in range(1, len(parts)):
        name = ".".join(parts[:count])
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, compilers.TASKS, module)
    return module


def test_the_assembler_is_chosen_before_anything_is_compiled(
    tasks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    tasks._set_triton_ptxas_path = lambda: os.environ.update(TRITON_PTXAS_PATH="/torch/bin/ptxas")
    choose_tools()
    assert os.environ["TRITON_PTXAS_PATH"] == "/torch/bin/ptxas"


def test_a_pytorch_that_has_no_such_choice_is_none_of_our_concern(
    tasks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_tools()
    tasks._set_triton_libdevice_path = lambda: 1 / 0
    choose_tools()
    monkeypatch.setitem(sys.modules, compilers.TASKS, None)
    choose_tools()


def test_sources_are_hashed_once_where_they_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    triton = SimpleNamespace(triton_key=lambda: asked.append("triton"))
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", triton)
    monkeypatch.setitem(sys.modules, "torch._inductor.codecache", SimpleNamespace())
    hash_sources()
    assert asked == ["triton"]
