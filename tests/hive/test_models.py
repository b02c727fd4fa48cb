"""What a hive makes of a start's model: whose alias counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.errors import NotFoundError
from rbee.hive.models import provisioner
from rbee.hive.workers import HiveSetup
from rbee.home import Home
from rbee.testing.tiny_model import write_tiny_model
from rbee.wire.messages import StartWorker


def setup_of(home: Home, node: str = "mac") -> HiveSetup:
    return HiveSetup(id="hive-1", home=home, run_dir=home.run, token="secret", node=node)


def silent(action: str, text: str, *, share: float | None = None) -> None:
    pass


async def test_the_meaning_that_comes_along_wins_over_the_nodes_own(
    home: Home, tmp_path: Path
) -> None:
    tiny = write_tiny_model(tmp_path / "tiny")
    home.config_file.write_text("[aliases]\nmini = '/nowhere'\n")
    bring = provisioner(setup_of(home))
    sources = (str(tmp_path / "other"), str(tiny), "hf:org/mini")
    for name in ("mini", "org/mini"):
        request = StartWorker(name, engine="vllm", alias="mini", sources=sources)
        model = await bring(request, silent)
        assert model is not None
        assert model.directory == tiny
        assert model.served_names == (tiny.as_uri(), "mini", "org/mini")
    with pytest.raises(NotFoundError, match="there is no model at /nowhere"):
        await bring(StartWorker("mini", engine="vllm"), silent)
