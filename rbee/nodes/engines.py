"""Whether an engine works where it is installed: it is imported, in a program of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from rbee.hints import install
from rbee.model import LOCALHOST
from rbee.models.child import log_tail
from rbee.nodes.node import Node
from rbee.process import run_program
from rbee.ssh import Connection, run

IMPORT = 120.0  # seconds; vLLM takes 15 of one core, and a disk may be slow
TAIL = 300


async def import_engine(node: Node, connection: Connection, engine: str) -> str:
    """Import an engine on a node; return why that fails, "" if it does not.

    Raises:
        SshError: the node cannot be asked.
    """
    with trio.move_on_after(IMPORT):
        argv = [f"{node.rbee_path}/rbee-hive", "import", engine]
        done = await run(connection, argv, env=node.environment)
        return _why(done.stderr) if done.status else ""
    return _SLOW


async def import_here(engine: str) -> str:
    """Import an engine on this machine, as `import_engine` does on a node."""
    with TemporaryDirectory(prefix="rbee-import-") as directory, trio.move_on_after(IMPORT):
        log = Path(directory) / "log"
        argv = [sys.executable, "-m", "rbee.hive", "import", engine]
        return _why(log_tail(log)) if await run_program(argv, log_file=log) else ""
    return _SLOW


def install_on(name: str, *flags: str) -> str:
    """Write the command that brings a node its engine."""
    if name == LOCALHOST:
        return install("cpu")
    return " ".join(["rbee-keeper node install", name, *flags])


_SLOW = f"it has not been imported after {IMPORT:g} s"


def _why(said: str) -> str:
    """Return the error that rbee told last, or whatever was said last."""
    lines = said.strip().splitlines() or ["(no word)"]
    told = [line for line in lines if line.startswith("error: ")]
    return (told or lines)[-1].removeprefix("error: ")[-TAIL:]
