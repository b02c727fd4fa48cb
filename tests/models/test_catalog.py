from __future__ import annotations

import json
import os

import attrs
import pytest

from rbee.errors import ConflictError, NotFoundError
from rbee.home import Home
from rbee.models.catalog import (
    Catalog,
    Entry,
    File,
    Origin,
    list_models,
    remove_model,
    show_model,
)
from rbee.models.staging import lock_now, open_partial
from tests.models.conftest import used

ENTRY = Entry(
    reference="pypi:some-model",
    source="pypi",
    version="1.2",
    files=(File("model.safetensors", 5, "abc"),),
    dtype="float32",
    architecture="LlamaForCausalLM",
    context=2048,
    has_chat_template=True,
)


def put(home: Home, name: str = "some", entry: Entry = ENTRY) -> None:
    directory = home.models / name
    directory.mkdir()
    for file in entry.files:
        (directory / file.name).write_bytes(b"x" * file.size)
    Catalog(home.models).save(name, entry)


def test_an_entry_comes_back_as_it_was_saved(home: Home) -> None:
    origin = Origin("file:///x.gguf", 7, 8, "def")
    put(home, entry=attrs.evolve(ENTRY, origins=(origin,)))
    (item,) = list_models(home)
    assert item.entry
    assert attrs.evolve(item.entry, last_used=0) == attrs.evolve(ENTRY, origins=(origin,))
    assert (item.damage, item.directory) == ("", home.models / "some")
    assert Catalog(home.models).find("file:///x.gguf") == [item]


def test_a_use_is_remembered(home: Home) -> None:
    put(home)
    os.utime(home.models / "some.json", (1, 1))
    catalog = Catalog(home.models)
    (item,) = catalog.items()
    assert item.entry
    assert item.entry.last_used == 1
    catalog.touch(item)
    (item,) = catalog.items()
    assert item.entry
    assert item.entry.last_used > 1


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"reference": 5}'])
def test_a_record_that_cannot_be_read_is_damaged(home: Home, text: bytes) -> None:
    put(home)
    put(home, "other")
    (home.models / "some.json").write_bytes(text)
    other, some = list_models(home)
    assert not other.damage
    assert some.entry is None
    assert "some.json is damaged" in some.damage


@pytest.mark.parametrize(("size", "why"), [(4, "has 4 bytes, needed 5"), (None, "is missing")])
def test_a_file_of_another_size_is_damage(home: Home, size: int | None, why: str) -> None:
    put(home)
    file = home.models / "some" / "model.safetensors"
    file.write_bytes(b"x" * size) if size else file.unlink()
    (item,) = list_models(home)
    assert item.entry
    assert why in item.damage


def test_a_model_is_shown_by_reference_alias_and_record(home: Home) -> None:
    put(home)
    by_reference = show_model(home, "pypi:Some_Model")
    assert by_reference == show_model(home, "some") == show_model(home, "pypi:some-model")
    assert show_model(home, "mine", aliases={"mine": "pypi:some-model"}) == by_reference
    with pytest.raises(NotFoundError, match="not in the catalog") as caught:
        show_model(home, "smollm2-135m")
    assert caught.value.hint == "rbee-keeper model list"


def test_removing_a_model_removes_all_that_was_made_of_it(home: Home) -> None:
    put(home, "raw")
    origin = Origin(ENTRY.reference, 5, 0, "abc")
    put(home, "made", attrs.evolve(ENTRY, origins=(origin,)))
    put(home, "other", attrs.evolve(ENTRY, reference="pypi:other"))
    removed = remove_model(home, "pypi:some-model")
    assert [item.name for item in removed] == ["made", "raw"]
    left = {path.name for path in home.models.rglob("*") if not path.is_dir()}
    assert left == {"other.json", "model.safetensors"}


def test_a_damaged_record_can_be_removed(home: Home) -> None:
    put(home)
    (home.models / "some.json").write_text("{")
    remove_model(home, "some")
    assert list_models(home) == []
    assert not (home.models / "some").exists()


def test_a_record_that_cannot_be_read_is_found_by_its_source(home: Home) -> None:
    put(home, "pypi--some-model")
    (home.models / "pypi--some-model.json").write_text("{")
    (item,) = show_model(home, "pypi:some-model")
    assert item.entry is None
    remove_model(home, "pypi:some-model")
    assert list_models(home) == []


def test_of_a_model_in_use_nothing_is_removed(home: Home) -> None:
    put(home, "raw")
    put(home, "made", attrs.evolve(ENTRY, origins=(Origin(ENTRY.reference, 5, 0, "abc"),)))
    with used(home, "made"):
        with pytest.raises(ConflictError, match="in use") as caught:
            remove_model(home, "pypi:some-model")
        assert caught.value.code == "model_in_use"
        assert [item.damage for item in list_models(home)] == ["", ""]
    remove_model(home, "pypi:some-model")
    assert list_models(home) == []


def test_a_model_that_is_being_fetched_is_kept(home: Home) -> None:
    put(home)
    with lock_now(home.models, "some"), pytest.raises(ConflictError, match="being fetched"):
        remove_model(home, "some")
    assert not list_models(home)[0].damage


def test_a_download_that_was_cut_off_is_told_and_can_be_removed(home: Home) -> None:
    partial = open_partial(home.models, "hf--tiny-1.1B--abc", "hf:org/tiny-1.1B")
    (partial / "part").write_bytes(b"x" * 7)
    (item,) = list_models(home)
    assert item.entry
    assert (item.entry.reference, item.entry.size) == ("hf:org/tiny-1.1B", 7)
    assert "rbee-keeper model pull hf:org/tiny-1.1B" in item.damage
    put(home)
    remove_model(home, "hf:org/tiny-1.1B")
    assert [item.name for item in list_models(home)] == ["some"]
    assert list((home.models / ".partial").iterdir()) == []


def test_with_a_model_goes_what_came_of_a_second_download(home: Home) -> None:
    put(home)
    (open_partial(home.models, "some", "pypi:some-model") / "part").write_bytes(b"x")
    assert [item.name for item in list_models(home)] == ["some"]
    remove_model(home, "pypi:some-model")
    assert list((home.models / ".partial").iterdir()) == []


def test_records_are_json_for_people(home: Home) -> None:
    put(home)
    told = json.loads((home.models / "some.json").read_text())
    assert told["reference"] == "pypi:some-model"
    assert told["files"] == [
        {
            "name": "model.safetensors",
            "size": 5,
            "sha256": "abc",
        }
    ]
