from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from cyclopts import Argument

from rbee import __version__
from rbee.home import Home
from rbee.keeper import app as keeper
from rbee.keeper.flags import every_flag
from rbee.sources import env_name, flags_of

REQUIRED = {"--model": "m", "--prompt": "p"}
FILE, ENVIRONMENT, FLAG = 0, 1, 2


def flag_cases() -> Iterator[Any]:
    for path, command in keeper.leaf_commands(keeper.app).items():
        for argument in flags_of(command.assemble_argument_collection()):
            yield pytest.param(path, argument, id=f"{' '.join(path)} {argument.name}")


def sample(argument: Argument, source: int) -> Any:
    """Return a value for the flag that differs from the next and the previous source's."""
    if argument.hint is bool:
        return source != ENVIRONMENT
    if argument.hint is int or "int" in str(argument.hint):
        return 11 + source
    if "float" in str(argument.hint):
        return 0.25 + source
    if "Literal" in str(argument.hint):
        return "cpu" if source == ENVIRONMENT else "cuda"
    if "tuple" in str(argument.hint):
        return (f"stop {source}", "b")
    return f"value-{source}"


def line_for(path: tuple[str, ...], argument: Argument, *, flag: bool) -> list[str]:
    command = keeper.leaf_commands(keeper.app)[path]
    arguments = command.assemble_argument_collection()
    names = {one.name for one in arguments}
    line = list(path) + ["m" for one in arguments if one.name.isupper()]
    for name, value in REQUIRED.items():
        if name in names and name != argument.name:
            line += [name, value]
    if flag:
        value = sample(argument, FLAG)
        for one in value if isinstance(value, tuple) else (value,):
            line += [argument.name] if one is True else [argument.name, str(one)]
    return line


def parsed(line: list[str], name: str) -> Any:
    _, bound, _ = keeper.app.parse_args(line, exit_on_error=False, print_error=False)
    flags = bound.kwargs["flags"]
    return getattr(flags, name.lstrip("-").replace("-", "_"))


def toml(argument: Argument, value: Any) -> str:
    shown = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    if isinstance(value, tuple):
        shown = str(list(value))
    return f"{argument.name.lstrip('-')} = {shown or repr(value)}\n"


@pytest.mark.parametrize(("path", "argument"), list(flag_cases()))
def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
    path: tuple[str, ...], argument: Argument, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, variable = argument.name, env_name(argument.name)
    in_file = name != "--home"
    if in_file:
        home.config_file.write_text(toml(argument, sample(argument, FILE)))
    value = sample(argument, ENVIRONMENT)
    told = '["stop 1", "b"]' if isinstance(value, tuple) else str(value)
    with monkeypatch.context() as patch:
        patch.setenv(variable, told)
        assert parsed(line_for(path, argument, flag=True), name) == sample(argument, FLAG)
        assert parsed(line_for(path, argument, flag=False), name) == value
    if in_file:
        assert parsed(line_for(path, argument, flag=False), name) == sample(argument, FILE)
        home.config_file.unlink()
    if name not in REQUIRED and in_file:
        assert parsed(line_for(path, argument, flag=False), name) == default(path, name)


def default(path: tuple[str, ...], name: str) -> Any:
    return {
        ("queen", "start", "--host"): "127.0.0.1",
        ("queen", "start", "--port"): 8080,
        ("logs", "--lines"): 50,
    }.get(
        (*path, name), {"--stop": (), "--json": False, "--raw": False, "--follow": False}.get(name)
    )


def test_the_flags_a_config_file_may_hold_are_those_of_the_commands() -> None:
    arguments = [argument.values[1] for argument in flag_cases()]
    assert every_flag() == {argument.name.lstrip("-") for argument in arguments}


def infer_flag(name: str, *more: str) -> Any:
    return parsed(["infer", "--model", "m", "--prompt", "p", *more], name)


def test_a_commands_table_wins_over_the_top_of_the_file(home: Home) -> None:
    home.config_file.write_text("seed = 1\ntop_k = 5\n[infer]\nseed = 2\n[run]\nseed = 3\n")
    assert infer_flag("--seed") == 2
    assert infer_flag("--top-k") == 5


def test_the_queens_table_gives_queen_start_its_port(home: Home) -> None:
    home.config_file.write_text("[queen]\nport = 9000\n")
    assert parsed(["queen", "start"], "--port") == 9000
    assert parsed(["queen", "start", "--port", "1"], "--port") == 1


def test_an_empty_variable_counts_as_unset(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBEE_SEED", "")
    assert infer_flag("--seed") is None


def test_a_stop_text_from_the_environment_keeps_its_blanks(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBEE_STOP", "User: a\n")
    assert infer_flag("--stop") == ("User: a\n",)


def test_what_a_command_removes_is_never_taken_from_the_environment(
    home: Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RBEE_MODEL", "m")
    assert keeper.run_line(["model", "rm"]) == 2
    assert "MODEL" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("temprature = 1", "'temprature' is unknown; did you mean 'temperature'?"),
        ("[infer]\ntemprature = 1", "'infer.temprature'"),
        ("[run]\nnonsense = 1", "'run.nonsense'"),
        ("[inver]\nseed = 1", "'inver'"),
        ("home = '/x'", "cannot be set here"),
        ("[queen]\nprot = 1", "queen.prot"),
        ("seed = 'many'", "many"),
        ("seed", "is not TOML"),
    ],
)
def test_a_wrong_config_file_is_told_whatever_the_command(
    home: Home, capfd: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    home.config_file.write_text(text)
    assert keeper.run_line(["infer", "--model", "m", "--prompt", "p"]) == 2
    err = capfd.readouterr().err
    assert told in err
    assert "Traceback" not in err
    assert "config.toml" in err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["infer", "--model", "m"], "--prompt"),
        (["infer", "--prompt", "p"], "--model"),
        (["infer", "--model", "m", "--prompt", "p", "--temprature", "1"], "--temperature"),
        (["infer", "--model", "m", "--prompt", "p", "--seed", "x"], "--seed"),
        (["infer", "--model", "m", "--prompt", "p", "--backend", "tpu"], "cpu"),
        (["infer", "--model", "m", "--prompt", "p", "stray"], "stray"),
        (["infer", "--model", "m", "--model", "n", "--prompt", "p"], "--model"),
        (["infer", "--model"], "--model"),
        (["infr"], "infer"),
        (["queen", "begin"], "begin"),
        (["run"], "MODEL"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_usage_is_one_error_and_one_suggestion_with_exit_2(
    home: Home, capfd: pytest.CaptureFixture[str], line: list[str], told: str
) -> None:
    assert keeper.run_line(line) == 2
    out, err = capfd.readouterr()
    first, second = err.splitlines()
    assert first.startswith("error: ")
    assert second.startswith("  hint: ")
    assert told in err
    assert out == ""


def test_version_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert keeper.run_line(["--version"]) == 0
    assert capfd.readouterr().out == f"rbee-keeper {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_flags(capfd: pytest.CaptureFixture[str], shell: str) -> None:
    assert keeper.run_line(["completion", shell]) == 0
    script = capfd.readouterr().out
    for word in ("infer", "queen", "max-tokens", "cuda"):
        assert word in script


@pytest.mark.slow
@pytest.mark.parametrize("line", [["--help"], ["infer", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(line: list[str]) -> None:
    heavy = ["trio", "httpx", "hypercorn", "asyncssh", "vllm", "torch", "sqlite3", "cattrs"]
    code = (
        "import sys; from rbee.keeper.app import run_line; code = run_line(sys.argv[1:]); "
        f"sys.exit(code or ' '.join(m for m in {heavy} if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "Usage" in done.stdout or __version__ in done.stdout
