"""What ``config.toml`` says about the keeper's flags, and that it says nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs
from cyclopts import App, ArgumentCollection, CycloptsError

from rbee.config import OWN_TABLES, Config, QueenConfig, load_config, wrong
from rbee.home import Home, find_home
from rbee.keeper.flags import every_flag
from rbee.sources import fill, flags_of, home_of, tokens_of, usage_error


class ConfigFile:
    """``$RBEE_HOME/config.toml``, of the home that flag or environment have named."""

    def __init__(self, known_commands: Callable[[], set[str]]) -> None:
        self._known_commands = known_commands

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        if "--home" not in {argument.name for argument in arguments}:
            return
        config = load_config(find_home(home_of(arguments)).config_file)
        values = self._values(config, commands[0] if commands else "")
        for argument in flags_of(arguments):
            key = argument.name.lstrip("-")
            if key in values and not argument.tokens:
                fill(argument, key, tokens_of(values[key]), config.source)

    def _values(self, config: Config, command: str) -> dict[str, Any]:
        """Check all of the file, whatever the command, and return what holds for this one."""
        found: dict[str, Any] = {}
        for key, value in config.flags.items():
            if not isinstance(value, dict):
                found[self._checked(key, "", config)] = value
            elif key not in self._known_commands():
                raise wrong(config.source, key, f"is unknown; tables: {self._tables()}")
        for table, values in config.flags.items():
            if isinstance(values, dict):
                checked = {self._checked(key, table, config): v for key, v in values.items()}
                found |= checked if table == command else {}
        if command == "queen":
            found |= _changed(config.queen)
        return found

    def _checked(self, key: str, table: str, config: Config) -> str:
        name = key.replace("_", "-")
        if name in every_flag() and name != "home":
            return name
        told = f"{table}.{key}" if table else key
        if name == "home":
            raise wrong(config.source, told, "cannot be set here: the home holds this file")
        raise wrong(config.source, told, "is unknown" + _close(name, every_flag()))

    def _tables(self) -> str:
        return ", ".join(sorted(self._known_commands() | set(OWN_TABLES)))


def _changed(queen: QueenConfig) -> dict[str, Any]:
    """Return what ``[queen]`` sets of the flags of ``queen start``."""
    default = QueenConfig()
    return {
        key: getattr(queen, key)
        for key in ("host", "port")
        if getattr(queen, key) != getattr(default, key)
    }


def load_settings(home: Home) -> Config:
    """Read ``config.toml``, with what the environment says of a queen of the command's own.

    Such a queen has the flags of one by hand: ``RBEE_PORT`` before ``[queen] port``. The hive it
    owns is told its port by the queen, so that the two do not fight for one.

    Raises:
        UsageError: a value cannot be what it should be.
    """
    from rbee.queen.__main__ import app

    line = ["daemon", "--owned", "--home", str(home.root)]
    try:
        _, bound, _ = app.parse_args(line, exit_on_error=False, print_error=False)
    except CycloptsError as exc:
        raise usage_error(exc, app) from exc
    config = load_config(home.config_file)
    said = {key: bound.arguments[key] for key in ("port", "lease") if key in bound.arguments}
    return attrs.evolve(config, queen=attrs.evolve(config.queen, **said))


def _close(name: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
