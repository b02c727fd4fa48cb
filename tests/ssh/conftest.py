"""A real sshd for the tests of this directory; each test gets an asyncio thread of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from rbee.aio import Aio, open_aio
from tests.ssh.sshd import SSHD, Sshd, open_sshd


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
def node_home(tmp_path: Path) -> str:
    return str(tmp_path / "node home")
