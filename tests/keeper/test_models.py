from __future__ import annotations

import json

import attrs
import pytest

from rbee.errors import ConflictError
from rbee.home import Home
from rbee.keeper.app import run_line
from rbee.keeper.flags import DataFlags
from rbee.keeper.models import drop_model
from rbee.models.catalog import Catalog, Entry, File
from tests.keeper import fake_queen
from tests.keeper.fake_queen import open_fake


@pytest.fixture
def model(home: Home) -> str:
    directory = home.models / "pypi--tiny"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    Catalog(home.models).save(
        "pypi--tiny", Entry("pypi:tiny", "pypi", "1.0", (File("config.json", 2),), "float32")
    )
    return "pypi:tiny"


def test_an_empty_catalog_is_an_empty_list(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_line(["model", "list", "--json"]) == 0
    assert capfd.readouterr().out == "[]\n"


def test_models_are_listed_and_shown(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_line(["model", "list"]) == 0
    assert "pypi:tiny  2 B   float32" in capfd.readouterr().out
    assert run_line(["model", "show", model, "--json"]) == 0
    (shown,) = json.loads(capfd.readouterr().out)
    assert (shown["files"], shown["version"]) == (["config.json"], "1.0")
    assert run_line(["model", "show", model]) == 0
    assert "files:" in capfd.readouterr().out


def test_a_model_is_removed(home: Home, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_line(["model", "rm", model]) == 0
    assert capfd.readouterr().err == "removed pypi:tiny\n"
    assert Catalog(home.models).items() == []
    assert run_line(["model", "rm", model]) == 1
    assert "hint: " in capfd.readouterr().err


async def test_a_model_that_a_worker_serves_stays(
    home: Home, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fake_queen, "WORKER", attrs.evolve(fake_queen.WORKER, served_names=(model,))
    )
    async with open_fake(home=home):
        with pytest.raises(ConflictError, match="in use"):
            await drop_model(DataFlags(), model)
    assert len(Catalog(home.models).items()) == 1


def test_pulling_what_cannot_be_is_told(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_line(["model", "pull", "no-such-model"]) == 1
    assert capfd.readouterr().err.startswith("error: ")
    assert run_line(["model", "pull", "./nowhere"]) == 1
