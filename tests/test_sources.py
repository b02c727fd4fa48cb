"""Where flags come from, for every flag of every program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from cyclopts import Argument

from rbee.config import QueenConfig
from rbee.errors import UsageError
from rbee.home import Home
from rbee.keeper.sources import load_settings
from rbee.sources import env_name
from tests.programs import DAEMONS, KEEPER, Program, key_of

REQUIRED = {"--model": "m", "--prompt": "p"}
FILE, ENVIRONMENT, FLAG = 0, 1, 2
JSON_LISTS = {"--stop", "--engine-arg"}
NOT_IN_FILES = {"home", "owned"}


def flag_cases() -> Iterator[Any]:
    for program in (KEEPER, *DAEMONS):
        for path, argument in program.flags():
            name = " ".join((program.name, *path, argument.name)).strip()
            yield pytest.param(program, path, argument, id=name)


def sample(argument: Argument, source: int) -> Any:
    """Return a value for the flag that differs from the next and the previous source's."""
    kind = str(argument.hint)
    if argument.hint is bool:
        return source != ENVIRONMENT
    if "int" in kind:
        return 11 + source
    if "float" in kind:
        return 0.25 + source
    if "Literal" in kind:
        return "cpu" if source == ENVIRONMENT else "cuda"
    if argument.name in ("--memory", "--max-waiting-size"):
        return f"{source + 1}G"
    if "tuple" in kind:
        return (f"stop-{source}", "b")
    return Path(f"value-{source}") if "Path" in kind else f"value-{source}"


def line_for(
    program: Program, path: tuple[str, ...], argument: Argument, *, flag: bool
) -> list[str]:
    arguments = program.commands()[path].assemble_argument_collection()
    names = {one.name for one in arguments}
    line = list(path) + ["m" for one in arguments if one.name.isupper()]
    for name, value in REQUIRED.items():
        if program is KEEPER and name in names and name != argument.name:
            line += [name, value]
    if flag:
        value = sample(argument, FLAG)
        for one in value if isinstance(value, tuple) else (value,):
            line += [argument.name] if one is True else [argument.name, str(one)]
    return line


def toml(program: Program, argument: Argument, value: Any) -> str:
    shown = repr(list(value) if isinstance(value, tuple) else value)
    if isinstance(value, bool):
        shown = str(value).lower()
    elif isinstance(value, Path):
        shown = repr(str(value))
    table = f"[{program.name}]\n" if program.table else ""
    return f"{table}{argument.name.lstrip('-')} = {shown}\n"


def default(program: Program, path: tuple[str, ...], name: str) -> Any:
    if program.table is not None:
        return getattr(program.table(), key_of(name))
    of_command = {
        ("queen", "start", "--host"): "127.0.0.1",
        ("queen", "start", "--port"): 8080,
        ("logs", "--lines"): 50,
        ("worker", "logs", "--lines"): 50,
    }
    of_all = {
        "--stop": (),
        "--engine-arg": (),
        "--json": False,
        "--wait": True,
        "--raw": False,
        "--follow": False,
        "--dry-run": False,
    }
    return of_command.get((*path, name), of_all.get(name))


@pytest.mark.parametrize(("program", "path", "argument"), list(flag_cases()))
def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
    program: Program,
    path: tuple[str, ...],
    argument: Argument,
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, in_file = argument.name, argument.name != "--home"
    if in_file:
        home.config_file.write_text(toml(program, argument, sample(argument, FILE)))
    value = sample(argument, ENVIRONMENT)
    told = " ".join(value) if isinstance(value, tuple) else str(value)
    if program is KEEPER and name in JSON_LISTS:
        told = '["stop-1", "b"]'
    said, unsaid = (line_for(program, path, argument, flag=flag) for flag in (True, False))
    with monkeypatch.context() as patch:
        patch.setenv(env_name(name), told)
        assert program.parse(said, name) == sample(argument, FLAG)
        assert program.parse(unsaid, name) == value
    if in_file:
        assert program.parse(unsaid, name) == sample(argument, FILE)
        home.config_file.unlink()
        if program is not KEEPER or name not in REQUIRED:
            assert program.parse(unsaid, name) == default(program, path, name)


@pytest.mark.parametrize("program", DAEMONS, ids=lambda program: program.name)
def test_a_programs_table_holds_the_programs_flags(program: Program) -> None:
    assert program.table is not None
    flags = {key_of(argument.name) for _, argument in program.flags()}
    assert set(attrs.fields_dict(program.table)) == flags - NOT_IN_FILES


def test_an_owned_worker_is_told_all_by_its_owner(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBEE_MODEL", "the keeper's")
    home.config_file.write_text('[worker]\nengine = "echo"\n')
    worker = DAEMONS[-1]
    assert worker.parse([], "--model") == "the keeper's"
    assert worker.parse(["--owned"], "--model") == ""
    assert worker.parse(["--owned"], "--engine") == "vllm"


def test_a_commands_own_queen_has_the_flags_of_one_by_hand(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings(home).queen == QueenConfig()
    home.config_file.write_text("[queen]\nport = 1\nlease = 5\nhive_port = 2\n")
    assert load_settings(home).queen == QueenConfig(port=1, lease=5, hive_port=2)
    monkeypatch.setenv("RBEE_PORT", "3")
    monkeypatch.setenv("RBEE_LEASE", "7.5")
    assert load_settings(home).queen == QueenConfig(port=3, lease=7.5, hive_port=2)
    monkeypatch.setenv("RBEE_LEASE", "long")
    with pytest.raises(UsageError, match=r"RBEE_LEASE.*float") as caught:
        load_settings(home)
    assert caught.value.hint == "queen-rbee daemon --help"


@pytest.mark.parametrize("program", DAEMONS, ids=lambda program: program.name)
def test_only_an_owner_says_that_a_program_is_owned(
    program: Program, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBEE_OWNED", "1")
    command = next(iter(program.commands()))
    assert program.parse(list(command), "--owned") is False
