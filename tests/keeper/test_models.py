from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from rbee.errors import ConflictError, NotFoundError, UnavailableError
from rbee.home import Home
from rbee.keeper.app import run_line
from rbee.keeper.flags import ModelFlags, PullFlags, RemoveFlags
from rbee.keeper.models import ago, print_model, print_models
from rbee.keeper.pull import pull_model
from rbee.keeper.removal import remove_models
from rbee.models.catalog import Catalog
from rbee.models.inspect import inspect_model
from rbee.models.provision import _entry
from rbee.testing.tiny_model import write_tiny_model
from rbee.wire.messages import Error, ModelInfo, Narration, Pulled, PullModel
from tests.keeper.fake_queen import FakeQueen, open_fake
from tests.models.conftest import used

Put = Callable[..., str]
DAY = 86400.0
REMOTE = ModelInfo("hf:org/far", "hf--far", "far", "/there", size=7, references=("hf:org/far",))
HERE = ModelInfo("hf:org/here", "hf--here", "localhost", "/here", references=("hf:org/here",))


@pytest.fixture
def put(home: Home) -> Put:
    """Put a tiny model into the catalog; return its reference."""

    def put(name: str = "tiny", days_ago: float = 0.0) -> str:
        directory = write_tiny_model(home.models / f"pypi--{name}")
        entry = _entry(f"pypi:{name}", inspect_model(directory), version="1.0")
        then = time.time() - days_ago * DAY
        Catalog(home.models).save(directory.name, attrs.evolve(entry, created=then))
        os.utime(home.models / f"{directory.name}.json", (then, then))
        return f"pypi:{name}"

    return put


def names(home: Home) -> list[str]:
    return [item.name for item in Catalog(home.models).items()]


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


# list and show --------------------------------------------------------------------------------
def test_an_empty_catalog_is_an_empty_list(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_line(["model", "list", "--json"]) == 0
    assert capfd.readouterr().out == "[]\n"


def test_models_are_listed_with_the_space_they_take(
    home: Home, put: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    put(days_ago=3.1)
    with used(home, "pypi--tiny"):
        assert run_line(["model", "list"]) == 0
    out, err = capfd.readouterr()
    head, line = out.splitlines()
    assert head.split() == [
        "MODEL", "SIZE", "DTYPE", "CONTEXT", "TEMPLATE", "LAST", "USED", "IN", "USE", "DAMAGE",
    ]  # fmt: skip
    assert line.split()[0] == "pypi:tiny"
    assert line.split()[3:] == ["float32", "2048", "yes", "3", "days", "ago", "yes", "-"]
    assert err.startswith("1 model, ")
    assert f"free at {home.models}" in err


def test_a_model_is_shown_with_all_that_is_known(
    home: Home, put: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    model = put()
    assert run_line(["model", "show", model, "--json"]) == 0
    (shown,) = json.loads(capfd.readouterr().out)
    assert (shown["version"], shown["in_use"], shown["damage"]) == ("1.0", False, "")
    assert "config.json" in shown["files"]
    assert shown["size"] == size_of(home.models / "pypi--tiny")
    assert time.time() - shown["last_used"] < 60
    assert run_line(["model", "show", model]) == 0
    out = capfd.readouterr().out
    for fact in ("files:", "chat template: yes", "(just now)", "architecture:  LlamaForCausalLM"):
        assert fact in " ".join(out.split()) or fact in out
    assert run_line(["model", "show", "tinyllama"]) == 1
    assert "hint: " in capfd.readouterr().err


def test_damage_is_told_and_no_failure(
    home: Home, put: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    put("one")
    put("two")
    (home.models / "pypi--one" / "config.json").unlink()
    (home.models / "pypi--two.json").write_text("{")
    assert run_line(["model", "list"]) == 0
    out = capfd.readouterr().out
    assert "config.json is missing" in out
    assert "pypi:two" in out
    assert "pypi--two.json is damaged" in out
    assert run_line(["model", "show", "pypi:two"]) == 0
    assert "is damaged" in capfd.readouterr().out


async def test_with_a_queen_the_models_of_all_nodes_are_listed(
    home: Home, put: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    put()
    async with open_fake(FakeQueen(models=[HERE, REMOTE]), home) as (queen, _):
        await print_models(ModelFlags())
        assert list(queen.hives) == ["localhost"]
        assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == [
            "NODE", "localhost", "far",
        ]  # fmt: skip
        await print_models(ModelFlags(node="far", json=True))
        assert [info["node"] for info in json.loads(capfd.readouterr().out)] == ["far"]
        assert "far" in queen.hives  # a hive was started there to look
        await print_model(ModelFlags(), "hf:org/far")
        assert "/there" in capfd.readouterr().out
        with pytest.raises(NotFoundError):
            await print_model(ModelFlags(node="localhost"), "hf:org/far")


async def test_a_queen_that_refuses_leaves_this_machines_models(
    home: Home, put: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    put()
    async with open_fake(FakeQueen(version="0.0.7"), home) as _:
        await print_models(ModelFlags())
        out, err = capfd.readouterr()
        assert "pypi:tiny" in out
        assert "is of version 0.0.7" in err
        home.token_file.write_text("wrong")
        with pytest.raises(ConflictError):
            await print_models(ModelFlags(node="far"))


@pytest.mark.parametrize(
    ("command", "more"),
    [(print_models, ()), (print_model, ("m",)), (pull_model, ("m",)), (remove_models, (("m",),))],
)
async def test_another_node_needs_a_queen(home: Home, command: Any, more: Any) -> None:
    kinds = {pull_model: PullFlags, remove_models: RemoveFlags}
    with pytest.raises(UnavailableError, match="no queen is running") as caught:
        await command(kinds.get(command, ModelFlags)(node="far"), *more)
    assert caught.value.hint == "rbee-keeper queen start"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "just now"),
        (-5, "just now"),
        (60, "1 minute ago"),
        (7200, "2 hours ago"),
        (3.9 * DAY, "3 days ago"),
    ],
)
def test_a_moment_is_told_by_its_distance(seconds: float, told: str) -> None:
    assert ago(1e9, 1e9 + seconds) == told
    assert ago(0.0) == "never"


# pull -----------------------------------------------------------------------------------------
def test_pulling_what_cannot_be_is_told(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_line(["model", "pull", "no-such-model"]) == 1
    assert capfd.readouterr().err.startswith("error: ")
    assert run_line(["model", "pull", "./nowhere"]) == 1


def test_pulling_what_is_here_prints_its_directory(
    home: Home, put: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    model = put()
    assert run_line(["model", "pull", model]) == 0
    assert capfd.readouterr().out == f"{home.models / 'pypi--tiny'}\n"
    assert run_line(["model", "pull", model, "--node", "localhost", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["model"] == model


async def test_a_pull_for_a_node_goes_through_the_queen(
    home: Home, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    queen = FakeQueen(
        script=[Narration("hive", "fetch", "it", 0.5), Pulled("hf:org/far", "/there")]
    )
    async with open_fake(queen, home):
        await pull_model(PullFlags(node="far", dtype="bfloat16"), "hf:org/far")
        assert capfd.readouterr() == ("/there\n", "hive: fetch it 50 %\n")
        (request,) = queen.pulls
        assert request == PullModel("hf:org/far", "far", "bfloat16", hub=request.hub)
        assert request.hub.token == "hf_mine"
        queen.script = [Error("insufficient", "no room", "free some")]
        with pytest.raises(Exception, match="no room"):
            await pull_model(PullFlags(node="far"), "hf:org/far")


# rm -------------------------------------------------------------------------------------------
def test_models_are_removed(home: Home, put: Put, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_line(["model", "rm", put("one"), put("two"), "--dry-run"]) == 0
    assert capfd.readouterr().err.startswith("would remove pypi:one (")
    assert len(names(home)) == 2
    assert run_line(["model", "rm", "pypi:one", "pypi:two"]) == 0
    err = capfd.readouterr().err
    assert err.startswith("removed pypi:one (")
    assert names(home) == []
    assert run_line(["model", "rm", "pypi:one"]) == 1
    assert "hint: " in capfd.readouterr().err


def test_when_one_cannot_be_removed_none_is(
    home: Home, put: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = put("one"), put("two")
    with used(home, "pypi--two"):
        assert run_line(["model", "rm", one, two]) == 1
    assert "error: pypi:two is in use" in capfd.readouterr().err
    assert run_line(["model", "rm", one, "pypi:nowhere"]) == 1
    assert names(home) == ["pypi--one", "pypi--two"]


async def test_a_model_of_another_node_is_removed_through_the_queen(
    home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    queen = FakeQueen(models=[HERE, REMOTE])
    async with open_fake(queen, home):
        await remove_models(RemoveFlags(node="far", json=True), ("hf:org/far",))
        assert queen.removed == ["far/hf--far"]
        assert json.loads(capfd.readouterr().out)[0]["size"] == 7
        with pytest.raises(NotFoundError):
            await remove_models(RemoveFlags(node="far"), ("hf:org/here",))


@pytest.mark.parametrize(
    "line",
    [[], ["m", "--prune"], ["--unused-for", "3d"]],
)
def test_removal_is_of_names_or_a_pruning(
    home: Home, line: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_line(["model", "rm", *line]) == 2
    assert "--prune" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ([], ["new", "old", "used"]),
        (["--unused-for", "5d"], ["new", "used"]),
        (["--max-size", "1"], ["used"]),
    ],
)
def test_pruning_removes_what_is_not_needed(
    home: Home, put: Put, line: list[str], left: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    for name, days in (("used", 90), ("older", 60), ("old", 10), ("new", 1)):
        put(name, days_ago=days)
    with used(home, "pypi--used"):
        assert run_line(["model", "rm", "--prune", *line, "--dry-run"]) == 0
        told, err = capfd.readouterr()
        assert "would free" in err
        assert len(names(home)) == 4
        assert run_line(["model", "rm", "--prune", *line]) == 0
    assert names(home) == [f"pypi--{name}" for name in left]
    out, err = capfd.readouterr()
    assert out == told
    assert out.startswith("pypi:older  ")
    assert "last used 60 days ago" in out
    assert "freed " in err
    assert ("what is left is in use" in err) == ("--max-size" in line)


def test_what_was_pruned_is_told_as_json(
    home: Home, put: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    put("old", days_ago=50)
    size = size_of(home.models / "pypi--old")
    assert run_line(["model", "rm", "--prune", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["freed"], told["left"], told["dry_run"]) == (size, 0, False)
    assert [info["model"] for info in told["removed"]] == ["pypi:old"]


@pytest.mark.parametrize("line", [["--unused-for", "-3d"], ["--max-size", "many"]])
def test_a_bound_that_is_none_is_refused(
    home: Home, line: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_line(["model", "rm", "--prune", "=".join(line)]) == 1
    err = capfd.readouterr().err
    assert "hint: rbee-keeper model rm --prune" in err
