"""What the documents say of flags, messages, packages and routes is so."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import pytest
from cyclopts import App, CycloptsError

import rbee
from rbee.alias import Defaults
from rbee.api.documents import DAEMONS, document_of
from rbee.config import HiveConfig, KeyConfig, QueenConfig, WorkerFlags, load_config
from rbee.errors import BY_CODE
from tests.programs import DAEMONS as PROGRAMS
from tests.programs import KEEPER

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "rbee"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\|(.*)\|$", re.MULTILINE)


def blocks(page: Path, language: str) -> Iterator[str]:
    for name, text in FENCE.findall(page.read_text()):
        if name == language:
            yield text


def rows(page: str, heading: str = "") -> list[list[str]]:
    """Return the cells of the tables below a heading, less their heads."""
    text = (DOCS / page).read_text()
    if heading:
        text = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
        text = re.split(r"^#+ ", text, flags=re.MULTILINE)[0]
    return [cells for cells in table(text) if cells[0].startswith("`")]


def table(text: str) -> Iterator[list[str]]:
    for row in ROW.findall(text):
        yield [cell.strip() for cell in row.split("|")]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


# links and commands ---------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@cache
def programs() -> dict[str, App]:
    daemons = {
        "queen": "queen-rbee", "hive": "rbee-hive", "worker": "llm-worker-rbee",
    }  # fmt: skip
    found = {daemons[one.name]: one.app for one in PROGRAMS}
    return {"rbee-keeper": KEEPER.app, **found}


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ ").rstrip("&"), comments=True)
        for at, word in enumerate(words):
            if word.rpartition("/")[2] in programs():
                yield [word.rpartition("/")[2], *words[at + 1 :]]
                break


def test_every_command_that_is_shown_can_be_given() -> None:
    shown = [
        line for page in PAGES for text in blocks(page, "sh") for line in commands(text)
    ]  # fmt: skip
    units = [unit.get("Service", "ExecStart") for unit in map(unit_of, UNITS)]
    shown += [line for text in units for line in commands(text)]
    assert len(shown) > 40
    for name, *words in shown:
        try:
            programs()[name].parse_args(words, exit_on_error=False, print_error=False)
        except CycloptsError as exc:
            pytest.fail(f"{name} {shlex.join(words)}: {exc}")


# systemd --------------------------------------------------------------------------------------
UNITS = sorted((DOCS / "systemd").glob("*.service"))


def unit_of(path: Path) -> configparser.RawConfigParser:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(path)
    return unit


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_understands_the_units(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    text = path.read_text()
    program = shutil.which("true")
    copy.write_text(re.sub(r"ExecStart=\S+", f"ExecStart={program}", text))
    argv = ["systemd-analyze", "verify", "--man=no", str(copy)]
    done = subprocess.run(argv, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if path.name in line]
    assert not said


# configuration --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("`[queen]`", QueenConfig), ("`[hive]`", HiveConfig), ("`[worker]`", WorkerFlags),
        ("`[keys.NAME]`", KeyConfig), ("`[aliases.NAME]`", Defaults),
    ],
)  # fmt: skip
def test_the_tables_of_keys_are_those_of_the_program(heading: str, kind: type[Any]) -> None:
    told = {names(row[0])[0]: default_of(row[1]) for row in rows("configuration.md", heading)}
    assert told == {field.name: plain(field.default) for field in attrs.fields(kind)}


def default_of(cell: str) -> str:
    return "" if cell == "none" else "".join(names(cell))


def plain(default: Any) -> str:
    if default in (None, ()) or isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return ""
    return str(default)


def test_the_table_of_flags_is_that_of_the_keeper() -> None:
    told = [names(row[0])[0] for row in rows("configuration.md", "Flags of `rbee-keeper`")]
    assert sorted(told) == sorted({argument.name for _, argument in KEEPER.flags()})


def test_the_example_of_a_config_file_is_taken(tmp_path: Path) -> None:
    (text,) = blocks(DOCS / "configuration.md", "toml")
    path = tmp_path / "config.toml"
    path.write_text(text)
    config = load_config(path)
    assert (config.queen.max_waiting, config.keys["alice"].models) == (512, ("bee",))


# errors, routes, packages ---------------------------------------------------------------------
def test_the_table_of_errors_is_that_of_the_program() -> None:
    found = {
        code: (row[0], names(row[1])[0])
        for row in re_rows("api.md", r"\d{3}")
        for code in names(row[2])
    }
    assert found == {code: (str(c.http_status), c.__name__) for code, c in BY_CODE.items()}


def re_rows(page: str, first: str) -> list[list[str]]:
    text = (DOCS / page).read_text()
    return [cells for cells in table(text) if re.fullmatch(first, cells[0])]


def test_the_table_of_routes_is_that_of_the_documents() -> None:
    told = [(row[0], names(row[1])[0], row[2]) for row in re_rows("api.md", "[A-Z]+")]
    assert told == [
        (method.upper(), path, operation["summary"])
        for daemon in DAEMONS
        for path, methods in document_of(daemon)["paths"].items()
        for method, operation in methods.items()
    ]


def templates() -> list[str]:
    """Return every text of the program, with … for what is put in."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else "…" for one in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_that_are_quoted_are_said() -> None:
    said = templates()
    quoted = [text.strip() for text in blocks(DOCS / "troubleshooting.md", "text")]
    assert len(quoted) > 25
    for message in quoted:
        pieces = [re.escape(piece) for piece in message.split("…")]
        assert any(re.search(".*".join(pieces), text, re.DOTALL) for text in said), message


def imports(path: Path) -> Iterator[str]:
    """Yield what a module imports of rbee: packages, or ``top`` for the modules beside them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [node.module or ""]
            if node.module == "rbee":
                found = [f"rbee.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            first, _, rest = name.partition(".")
            if first == "rbee":
                package = rest.partition(".")[0]
                yield package if (PACKAGE / package / "__init__.py").exists() and package else "top"


def test_packages_import_what_the_table_says() -> None:
    found: dict[str, set[str]] = {}
    for path in PACKAGE.glob("*/*.py"):
        found.setdefault(path.parent.name, set()).update(imports(path))
    told = {names(row[0])[0]: set(names(row[2])) for row in rows("architecture.md")}
    assert told.pop("guard.py") == set(imports(PACKAGE / "guard.py"))
    assert {name: packages - {"top", name} for name, packages in found.items()} == told


# the library ----------------------------------------------------------------------------------
def test_every_public_name_is_documented_and_all_fit_one_screen() -> None:
    told = [name for row in rows("embedding.md", "Every name") for name in names(row[0])]
    assert sorted(told) == sorted(rbee.__all__)
    assert len(told) <= 40
    assert not [name for name in told if not getattr(getattr(rbee, name), "__doc__", None)]
