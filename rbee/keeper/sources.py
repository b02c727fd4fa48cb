"""Where flags come from beside the command line: the environment, then config.toml.

cyclopts calls the sources in order; each fills only what the earlier ones have left open, which is
the precedence flag, environment, file, default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cyclopts import App, Argument, ArgumentCollection, Token
from cyclopts.config import Env

from rbee.config import OWN_TABLES, Config, QueenConfig, load_config, wrong
from rbee.home import find_home
from rbee.keeper.flags import every_flag

PREFIX = "RBEE_"


def env_name(flag: str) -> str:
    """``--max-tokens`` → ``RBEE_MAX_TOKENS``."""
    return PREFIX + flag.lstrip("-").upper().replace("-", "_")


def flags_of(arguments: ArgumentCollection) -> Iterator[Argument]:
    """Yield what has a ``--name``: a positional is said, never inherited (``model rm``)."""
    return (argument for argument in arguments if argument.name.startswith("--"))


class Environment(Env):
    """``RBEE_<FLAG>``; an empty variable counts as unset."""

    def __init__(self) -> None:
        super().__init__(PREFIX, command=False)

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        for argument in flags_of(arguments):
            name = env_name(argument.name)
            value = os.environ.get(name)
            if value and not argument.tokens:
                split = argument.parameter.env_var_split
                _fill(argument, name, split(argument.hint, value), name)


class ConfigFile:
    """``$RBEE_HOME/config.toml``, of the home that flag or environment have named."""

    def __init__(self, known_commands: Callable[[], set[str]]) -> None:
        self._known_commands = known_commands

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        if "--home" not in {argument.name for argument in arguments}:
            return
        config = load_config(find_home(_home_of(arguments)).config_file)
        values = self._values(config, commands[0] if commands else "")
        for argument in flags_of(arguments):
            key = argument.name.lstrip("-")
            if key in values and not argument.tokens:
                _fill(argument, key, _tokens(values[key]), config.source)

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


def _close(name: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _home_of(arguments: ArgumentCollection) -> Path | None:
    for argument in arguments:
        if argument.name == "--home" and argument.tokens:
            return Path(argument.tokens[-1].value)
    return None


def _tokens(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(item).lower() if isinstance(item, bool) else str(item) for item in values]


def _fill(argument: Argument, keyword: str, values: Iterable[str], source: str) -> None:
    for index, value in enumerate(values):
        argument.append(Token(keyword=keyword, value=value, source=source, index=index))
