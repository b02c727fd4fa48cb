"""What a hive makes of a start's model: whose alias counts, and where an error was."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.errors import BadInputError, NotFoundError, RbeeError
from rbee.hive.failures import telling_where
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
    with pytest.raises(NotFoundError, match="node mac: there is no model at /nowhere"):
        await bring(StartWorker("mini", engine="vllm"), silent)


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        ("ls /data", "ls /data   # on mac"),
        ("ls /data   # or so", "ls /data   # on mac; or so"),
        ("rbee-keeper model list", "rbee-keeper model list --node mac"),
        (
            "HF_TOKEN=hf_… rbee-keeper model pull hf:org/x   # after a while",
            "HF_TOKEN=hf_… rbee-keeper model pull hf:org/x --node mac   # after a while",
        ),
        ("rbee-keeper model aliases", "rbee-keeper model aliases"),
        ("rbee-keeper worker stop --all", "rbee-keeper worker stop --all"),
        ("", ""),
    ],
)
def test_an_error_says_which_nodes_disk_it_is_about(hint: str, told: str) -> None:
    for node, message, expected in (("mac", "node mac: full", told), ("localhost", "full", hint)):
        with pytest.raises(RbeeError) as caught, telling_where(node):
            raise BadInputError("full", hint=hint)
        assert (caught.value.message, caught.value.hint) == (message, expected)
