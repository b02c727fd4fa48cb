from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from rbee import __version__
from rbee.home import Home
from rbee.keeper import app as keeper
from rbee.keeper.flags import every_flag
from tests.programs import KEEPER


def parsed(line: list[str], name: str) -> Any:
    return KEEPER.parse(line, name)


def test_the_flags_a_config_file_may_hold_are_those_of_the_commands() -> None:
    assert every_flag() == {argument.name.lstrip("-") for _, argument in KEEPER.flags()}


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
    monkeypatch.setenv("RBEE_PRUNE", "true")
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
@pytest.mark.parametrize(
    "line", [["--help"], ["infer", "--help"], ["node", "add", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(line: list[str]) -> None:
    heavy = ["trio", "httpx", "hypercorn", "asyncssh", "vllm", "torch", "sqlite3", "cattrs"]
    code = (
        "import sys; from rbee.keeper.app import run_line; code = run_line(sys.argv[1:]); "
        f"sys.exit(code or ' '.join(m for m in {heavy} if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "Usage" in done.stdout or __version__ in done.stdout


def test_a_list_in_the_environment_that_is_none_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RBEE_STOP", "[one")
    assert keeper.run_line(["infer", "--model", "m", "--prompt", "p"]) == 2
    assert "begins like a JSON list and is none" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("rbee --help | head -1; exit ${PIPESTATUS[0]}", 0, ""),
        ("rbee status >/dev/full", 1, "cannot write to stdout: No space left on device"),
        ("echo hello | $PYTHON -m rbee run nosuch", 1, "no model is called 'nosuch'"),
    ],
)
def test_whatever_becomes_of_stdin_and_stdout_is_told_in_one_line(
    home: Home, line: str, code: int, said: str
) -> None:
    script = line.replace("rbee ", '"$PYTHON" -m rbee ', 1) if line.startswith("rbee") else line
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PYTHON": sys.executable},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
