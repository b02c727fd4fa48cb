"""The four programs' command lines, taken apart for the tests: who takes which flag."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
from cyclopts import App, Argument

from rbee.config import HiveConfig, QueenConfig, WorkerFlags
from rbee.hive.__main__ import app as hive_app
from rbee.keeper.app import app as keeper_app
from rbee.keeper.app import leaf_commands
from rbee.queen.__main__ import app as queen_app
from rbee.sources import flags_of
from rbee.worker.__main__ import app as worker_app


@attrs.frozen(eq=False)
class Program:
    """A program; ``table`` are its flags as ``config.toml`` has them, in ``[name]``."""

    name: str
    app: App
    table: type[Any] | None = None

    def commands(self) -> dict[tuple[str, ...], App]:
        return leaf_commands(self.app) or {(): self.app}

    def flags(self) -> Iterator[tuple[tuple[str, ...], Argument]]:
        for path, command in self.commands().items():
            for argument in flags_of(command.assemble_argument_collection()):
                yield path, argument

    def parse(self, line: list[str], name: str) -> Any:
        """Return what the flag ``name`` is after ``line``, environment and file."""
        _, bound, _ = self.app.parse_args(line, exit_on_error=False, print_error=False)
        bound.apply_defaults()
        key = key_of(name)
        return bound.arguments[key] if self.table else getattr(bound.arguments["flags"], key)


def key_of(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


KEEPER = Program("", keeper_app)
DAEMONS = [
    Program("queen", queen_app, QueenConfig),
    Program("hive", hive_app, HiveConfig),
    Program("worker", worker_app, WorkerFlags),
]
