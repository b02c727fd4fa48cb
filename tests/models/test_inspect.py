from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from rbee.errors import BadInputError
from rbee.models.inspect import inspect_model, read_header


def safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_model_tells_what_it_is(tiny: Path) -> None:
    found = inspect_model(tiny)
    assert found.architecture == "LlamaForCausalLM"
    assert found.dtype == "float32"
    assert found.context == 2048
    assert found.has_chat_template
    assert found.weight_bytes == 4 * found.parameters > 400_000
    assert found.size == sum(path.stat().st_size for path in tiny.iterdir())
    assert "tokenizer.json" in dict(found.files)


def test_the_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": tensor("F32", [2], 0, 8),
        "b": tensor("BF16", [8], 8, 24),
    }
    weights = read_header(safetensors(tmp_path / "x.safetensors", header, bytes(24)))
    assert weights.parameters == 10
    assert weights.bytes_by_dtype.most_common(1) == [("BF16", 16)]


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_may_be_a_file_or_a_setting(tiny: Path, name: str) -> None:
    (tiny / "tokenizer_config.json").write_text('{"chat_template": ""}')
    assert not inspect_model(tiny).has_chat_template
    (tiny / name).write_text('{"chat_template": "{{ messages }}"}')
    assert inspect_model(tiny).has_chat_template


def test_the_context_may_stand_in_the_text_part_or_nowhere(tiny: Path) -> None:
    config = {"architectures": ["X"], "text_config": {"max_position_embeddings": 77}}
    (tiny / "config.json").write_text(json.dumps(config))
    assert inspect_model(tiny).context == 77
    (tiny / "config.json").write_text('{"architectures": ["X"]}')
    assert inspect_model(tiny).context == 0


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_weights_that_were_cut_short_are_corrupt(tiny: Path, keep: int) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(BadInputError, match=r"model\.safetensors is corrupt") as caught:
        inspect_model(tiny)
    assert caught.value.details["file"] == str(weights)


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        (b"\xff{", b"", "not JSON"),
        ([], b"", "not an object"),
        ({}, b"", "no tensors"),
        ({"a": tensor("F32", [1], 0, 4)}, b"12345", "end at byte 4, the data has 5"),
        ({"a": tensor("F32", [2], 0, 4)}, b"1234", "needs 8 bytes and has 4"),
        ({"a": tensor("F32", [-1], 0, 4)}, b"1234", "described wrongly"),
        ({"a": tensor("F32", [1], 4, 0)}, b"1234", "described wrongly"),
        ({"a": "F32"}, b"1234", "described wrongly"),
        ({"a": {"dtype": 1, "shape": [], "data_offsets": [0, 4]}}, b"1234", "described wrongly"),
    ],
)
def test_a_header_that_makes_no_sense_is_corrupt(
    tmp_path: Path, header: Any, data: bytes, why: str
) -> None:
    with pytest.raises(BadInputError, match=why):
        read_header(safetensors(tmp_path / "x.safetensors", header, data))


def test_every_shard_of_the_index_must_be_there(tiny: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInputError, match=r"names model-2\.safetensors, which is not there"):
        inspect_model(tiny)


def test_pickled_weights_are_refused(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(BadInputError, match=r"needed: \*\.safetensors.*a pickle"):
        inspect_model(tiny)


def test_a_directory_without_config_json_is_not_a_model(tiny: Path) -> None:
    (tiny / "config.json").unlink()
    with pytest.raises(BadInputError, match=r"has no config\.json") as caught:
        inspect_model(tiny)
    assert caught.value.code == "not_a_model"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"architectures": []}'])
def test_a_config_without_sense_is_corrupt(tiny: Path, text: str) -> None:
    (tiny / "config.json").write_text(text)
    with pytest.raises(BadInputError, match=r"config\.json is corrupt"):
        inspect_model(tiny)
