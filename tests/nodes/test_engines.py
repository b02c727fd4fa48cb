"""Whether an engine works is found out by importing it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.nodes.engines import import_here, install_on


async def test_a_torch_that_cannot_be_imported_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open\\nmore')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert await import_here("vllm") == "vLLM cannot be imported: OSError: libtorch.so: cannot open"
    assert await import_here("echo") == ""


def test_this_machine_gets_its_engine_by_pip() -> None:
    assert " -m pip install " in install_on("localhost")
    assert install_on("mac", "--force") == "rbee-keeper node install mac --force"
