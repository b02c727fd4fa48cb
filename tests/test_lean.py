"""What our own programs do to start sooner is undone once they have."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rbee.lean import no_collecting

FORKED = """
import sys, trio
from rbee.worker.engine import engine_kind
engine_kind("echo").preload()
from rbee.web.client import open_client
loaded = set(sys.modules)
async def main():
    async with open_client("http://127.0.0.1:1", "token"):
        pass
trio.run(main)
print(*set(sys.modules) - loaded)
"""


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_cycles_are_looked_for_again_after_the_imports() -> None:
    with no_collecting():
        assert not gc.isenabled()
        kept = [[]]
        kept[0].append(kept)
    assert gc.isenabled()
    assert not any(one is kept for one in gc.get_objects())  # frozen: it is not looked at again


def test_cycles_are_looked_for_again_after_a_failed_import() -> None:
    with pytest.raises(ImportError), no_collecting():
        raise ImportError
    assert gc.isenabled()


def test_a_forked_worker_imports_nothing_for_its_calls() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], stdout=subprocess.PIPE, check=True)
    assert done.stdout.split() == []
