"""Every block of Python in these documents runs as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import trio

from rbee.testing.processes import LeakCheck

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.slow


def blocks(name: str) -> list[str]:
    found = BLOCK.findall((DOCS / name).read_text())
    assert found
    return found


async def test_embedding(leaks: LeakCheck) -> None:
    outputs = [await run(sys.executable, "-c", block) for block in blocks("embedding.md")]
    assert "What is a bee? What 5 localhost" in outputs[0]
    assert outputs[1].endswith("one two one two")
    assert outputs[2].startswith("one two one ['ready']")
    assert outputs[3].startswith("localhost room ")
    assert len(outputs[3].splitlines()) > 1  # what was told on the way
    assert outputs[4].splitlines()[0].endswith("position=0) 1")
    assert outputs[4].endswith("one two one two ended\n")
    assert outputs[5].startswith("bad_input\n")
    assert leaks.find() == []


async def test_testing(leaks: LeakCheck, tmp_path: Path) -> None:
    for number, block in enumerate(blocks("testing.md")):
        (tmp_path / f"test_block_{number}.py").write_text(block)
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore", str(tmp_path))
    assert "3 passed" in await run(sys.executable, "-m", "pytest", *options)
    assert leaks.find() == []


async def test_quickstart(leaks: LeakCheck, tmp_path: Path) -> None:
    program, test = blocks("quickstart.md")
    assert await run(sys.executable, "-c", program) == "one two one\n"
    (tmp_path / "test_it.py").write_text(test)
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore", str(tmp_path))
    assert "1 passed" in await run(sys.executable, "-m", "pytest", *options)
    assert leaks.find() == []


async def run(*argv: str) -> str:
    with trio.fail_after(60):
        done = await trio.run_process(argv, capture_stdout=True, check=False)
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()
