"""Where flags come from beside the command line: the environment, then config.toml.

cyclopts calls the sources in order; each fills only what the earlier ones have left open, which is
the precedence flag, environment, file, default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
from cyclopts import App, Argument, ArgumentCollection, CycloptsError, Token
from cyclopts.config import Env

from rbee.config import load_config
from rbee.errors import UsageError
from rbee.home import find_home

PREFIX = "RBEE_"
Source = Callable[[App, tuple[str, ...], ArgumentCollection], None]


def env_name(flag: str) -> str:
    """``--max-tokens`` → ``RBEE_MAX_TOKENS``."""
    return PREFIX + flag.lstrip("-").upper().replace("-", "_")


def flags_of(arguments: ArgumentCollection) -> Iterator[Argument]:
    """Yield what has a ``--name``: a positional is said, never inherited (``model rm``).

    Neither is ``--owned``, which only an owner says, nor what chooses the things to end: those are
    declared with ``show_env_var=False``.
    """
    return (
        argument
        for argument in arguments
        if argument.name.startswith("--")
        and argument.name != "--owned"
        and argument.parameter.show_env_var is not False
    )


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
                fill(argument, name, split(argument.hint, value), name)


class Table:
    """A daemon's own table of ``$RBEE_HOME/config.toml``, as `Config` has it under ``name``."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        config = load_config(find_home(home_of(arguments)).config_file)
        table = getattr(config, self._name)
        default = type(table)()
        for argument in flags_of(arguments):
            key = argument.name.lstrip("-").replace("-", "_")
            value = getattr(table, key, None)
            is_set = key in attrs.fields_dict(type(table)) and value != getattr(default, key)
            if is_set and not argument.tokens:
                fill(argument, key, tokens_of(value), config.source)


def unless_owned(source: Source) -> Source:
    """Ask ``source`` only where no owner says all: ``RBEE_MODEL`` is the keeper's as well."""

    def ask(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        if not any(argument.name == "--owned" and argument.tokens for argument in arguments):
            source(app, commands, arguments)

    return ask


def home_of(arguments: ArgumentCollection) -> Path | None:
    for argument in arguments:
        if argument.name == "--home" and argument.tokens:
            return Path(argument.tokens[-1].value)
    return None


def tokens_of(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [str(item).lower() if isinstance(item, bool) else str(item) for item in values]


def fill(argument: Argument, keyword: str, values: Iterable[str], source: str) -> None:
    for index, value in enumerate(values):
        argument.append(Token(keyword=keyword, value=value, source=source, index=index))


def usage_error(exc: CycloptsError, app: App) -> UsageError:
    """Say what was wrong with one of our programs' command line, environment or file."""
    exc.verbose = False
    words = " ".join([*app.name, *(exc.command_chain or ()), "--help"])
    return UsageError(" ".join(str(exc).split()), hint=words)
