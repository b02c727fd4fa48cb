"""A real sshd for the tests of this directory; each test gets an asyncio thread of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rbee.aio import Aio, open_aio
from rbee.home import find_home
from tests.ssh.sshd import SSHD, Sshd, open_sshd
from tests.trees import wait_for


@pytest.fixture(scope="package")  # other packages take a running sshd for a leak
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    if SSHD is None:
        pytest.skip("no sshd here: apt-get install openssh-server")
    with open_sshd(tmp_path_factory.mktemp("sshd")) as sshd:
        yield sshd


@pytest.fixture
async def aio() -> AsyncIterator[Aio]:
    async with open_aio(name="ssh", uvloop=False) as aio:
        yield aio


@pytest.fixture
def node_home(tmp_path: Path) -> Iterator[str]:
    """Name a home on the node; nothing is left in its run directory."""
    home = tmp_path / "node home"
    yield str(home)
    run = find_home(home, {}).run
    wait_for(lambda: not run.is_dir() or not any(run.iterdir()))
    with suppress(FileNotFoundError):
        run.rmdir()
