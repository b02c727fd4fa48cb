"""A hub's token on its way from the keeper's environment to the child that downloads, for real."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from rbee.home import Home
from rbee.testing.hub_server import HubServer, Repo
from rbee.testing.processes import LeakCheck
from rbee.testing.tiny_model import write_tiny_model
from tests.keeper.test_infer import keeper
from tests.trees import holders

pytestmark = pytest.mark.slow

TOKEN = "hf_" + "secret" * 4


@attrs.define(eq=False)
class Watched(Repo):
    """Looks, while a file is being fetched, at who has the token."""

    said: set[str] = attrs.field(factory=set)
    knew: set[str] = attrs.field(factory=set)

    def blocks(self, name: str, offset: int = 0) -> Iterator[bytes]:
        self.said |= holders("cmdline", TOKEN)
        self.knew |= holders("environ", TOKEN)
        yield from super().blocks(name, offset)


async def test_a_token_reaches_the_download_and_is_kept_nowhere(
    home: Home, leaks: LeakCheck, tmp_path: Path
) -> None:
    home.config_file.write_text("[queen]\nport = 0\n[hive]\nport = 0\n")
    tiny = write_tiny_model(tmp_path / "tiny")
    files: dict[str, bytes | Path] = {path.name: path for path in tiny.iterdir()}
    repo = Watched(files, token=TOKEN)
    theirs = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_TOKEN": f"hf_other_{os.getpid()}",
        "HF_HUB_OFFLINE": "1",
    }
    with HubServer({"org/tiny": repo}).serve() as hub:
        ours = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        line = ("model", "pull", "hf:org/tiny", "--node", "localhost")
        try:
            assert (await keeper("queen", "start", env=os.environ | theirs)).returncode == 0
            pulled = await keeper(*line, env=os.environ | ours)
            assert pulled.returncode == 0, pulled.stderr
            standing = holders("environ", TOKEN) | holders("environ", theirs["HF_TOKEN"])
        finally:
            await keeper("queen", "stop")
    assert Path(pulled.stdout.decode().strip(), "config.json").exists()
    assert repo.said == set()
    assert any("rbee.models.hub org/tiny" in command for command in repo.knew)
    assert not any("rbee.queen" in command or "rbee.hive " in command for command in repo.knew)
    assert standing == set()
    assert TOKEN.encode() not in pulled.stdout + pulled.stderr
    for path in (*home.root.rglob("*"), *home.run.rglob("*")):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    await leaks.wait_clean(1)
