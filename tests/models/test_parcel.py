"""Which of this machine's models is sent for a name, and as what."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from rbee.errors import BadInputError, NotFoundError
from rbee.home import Home
from rbee.models.catalog import GGUF, Catalog, Entry, File, Origin
from rbee.models.inspect import inspect_model
from rbee.models.parcel import find_parcel
from rbee.models.provision import _entry
from rbee.testing.tiny_model import write_tiny_model

PACKAGE = "pypi:some-model"
ALIASES = {"mine": PACKAGE}


def put_made(home: Home, reference: str, dtype: str, last_used: float = 0) -> str:
    """Have what was made of a GGUF in the catalog."""
    name = f"gguf-0123-{dtype}"
    found = inspect_model(write_tiny_model(home.models / name))
    entry = _entry(reference, found, origins=(Origin(reference, 4, 0, "00"),))
    Catalog(home.models).save(name, attrs.evolve(entry, dtype=dtype, last_used=last_used))
    return name


def put_gguf(home: Home) -> str:
    name = "pypi--some-model"
    (home.models / name).mkdir()
    (home.models / name / "x.gguf").write_bytes(b"GGUF")
    Catalog(home.models).save(name, Entry(PACKAGE, "pypi", "1", (File("x.gguf", 4),), GGUF))
    return name


def found(home: Home, name: str = "mine", dtype: str | None = None) -> str:
    return find_parcel(home, name, aliases=ALIASES, dtype=dtype).name


def test_of_a_package_the_gguf_goes_or_what_was_made_in_the_dtype_asked_for(home: Home) -> None:
    made = put_made(home, PACKAGE, "float32")
    assert found(home) == found(home, PACKAGE) == found(home, made) == made
    gguf = put_gguf(home)
    assert found(home) == gguf
    assert found(home, dtype="float32") == made
    with pytest.raises(NotFoundError, match="not on this machine in bfloat16; it is in float32"):
        found(home, dtype="bfloat16")
    sent = find_parcel(home, made, aliases={}).entry
    assert sent.origins  # the node's own package is still the same one


def test_a_gguf_file_goes_as_what_was_made_of_it_by_the_path_it_has_here(
    home: Home, tmp_path: Path
) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(NotFoundError, match="is not on this machine") as caught:
        found(home, str(file))
    assert caught.value.hint == f"rbee-keeper model pull {file}"
    made = put_made(home, file.as_uri(), "float32")
    parcel = find_parcel(home, str(file), aliases={})
    assert (parcel.name, parcel.entry.reference) == (made, file.as_uri())
    assert parcel.entry.origins == ()


def test_what_is_damaged_or_none_is_refused(home: Home, tiny: Path) -> None:
    made = put_made(home, PACKAGE, "float32")
    (home.models / made / "config.json").write_text("{")
    with pytest.raises(BadInputError, match="mine is damaged on this machine: ") as caught:
        found(home)
    assert caught.value.hint == "rbee-keeper model pull mine"
    (tiny / "model.safetensors").unlink()
    with pytest.raises(BadInputError, match="holds no weights"):
        found(home, str(tiny))
    with pytest.raises(NotFoundError, match="no model is called"):
        found(home, "nobody")
    with pytest.raises(NotFoundError, match="file name too long"):
        found(home, "/" + "a" * 5000)
