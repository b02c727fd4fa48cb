"""The names of what is on disk: all of them, nothing that is broken, and no second look."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rbee.models import names as module
from rbee.models.catalog import Catalog, Entry, File, Origin
from rbee.models.names import CatalogNames


def save(models: Path, name: str, reference: str, *origins: str) -> None:
    (models / name).mkdir(parents=True)
    (models / name / "f").write_text("ab")
    made_of = tuple(Origin(origin, 1, 1, "") for origin in origins)
    Catalog(models).save(
        name, Entry(reference, "pypi", "1", (File("f", 2),), "float32", origins=made_of)
    )


def settle(models: Path) -> None:
    """Make the last change one of long ago, as of a catalog that nobody is at."""
    os.utime(models, (1, 1))


def test_every_name_of_what_is_whole_is_told(tmp_path: Path) -> None:
    save(tmp_path, "a", "pypi:a", "file:///a.gguf")
    save(tmp_path, "b", "pypi:b")
    save(tmp_path, "broken", "pypi:broken")
    (tmp_path / "broken" / "f").unlink()
    (tmp_path / "torn.json").write_text("{")
    assert CatalogNames(tmp_path).read() == ("file:///a.gguf", "pypi:a", "pypi:b")


def test_the_disk_is_read_again_only_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    read = module._names
    monkeypatch.setattr(module, "_names", lambda models: looks.append(models) or read(models))
    monkeypatch.setattr(module, "SETTLED", 600.0)  # the machine may be slow
    names = CatalogNames(tmp_path)
    save(tmp_path, "a", "pypi:a")
    names.read()
    names.read()
    assert len(looks) == 2  # what changed just now may change again within the same tick
    settle(tmp_path)
    for _ in range(3):
        assert names.read() == ("pypi:a",)
    assert len(looks) == 3
    save(tmp_path, "b", "pypi:b")
    assert names.read() == ("pypi:a", "pypi:b")


def test_a_directory_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert CatalogNames(tmp_path / "none").read() == ()
