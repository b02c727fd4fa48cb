from __future__ import annotations

from pathlib import Path

import pytest

from rbee.errors import BadInputError
from rbee.models.catalog import File
from rbee.models.repository import Fetched, Remote, choose, is_part


def chosen(*names: str) -> list[str]:
    return [file.name for file in choose("org/repo", map(Remote, names))]


def test_weights_config_tokenizer_and_template_are_taken_small_files_first() -> None:
    small = ["chat_template.jinja", "config.json", "merges.txt", "spiece.model", "tokenizer.json"]
    others = [
        ".gitattributes",
        "README.md",
        "pytorch_model.bin",
        "model.onnx",
        "trainer_state.json",
    ]
    names = ["model.safetensors", *small, *others]
    assert chosen(*names) == [*small, "model.safetensors"]


def test_code_and_pickles_are_never_taken() -> None:
    code = ["modeling.py", "tokenizer.py", "tokenizer.pkl", "training_args.bin", "x.pt", "run.sh"]
    assert chosen("config.json", "model.safetensors", *code) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "twice",
    [
        ["consolidated.safetensors"],
        ["consolidated-00001-of-00002.safetensors"],
        ["original/model-00001-of-00001.safetensors", "original/params.json"],
        ["model.safetensors"],
        ["model.fp16.safetensors"],
    ],
)
def test_the_same_weights_are_taken_once(twice: list[str]) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert chosen("config.json", index, *shards, *twice) == ["config.json", index, *shards]


def test_a_whole_file_is_taken_without_its_variants() -> None:
    variants = ["model.fp16.safetensors", "adapter_model.safetensors"]
    assert chosen("config.json", "model.safetensors", *variants) == [
        "config.json",
        "model.safetensors",
    ]


def test_weights_under_other_names_are_taken() -> None:
    assert chosen("config.json", "weights.safetensors") == ["config.json", "weights.safetensors"]
    assert "consolidated.safetensors" in chosen("config.json", "consolidated.safetensors")


def test_an_embedding_models_modules_are_taken() -> None:
    modules = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    assert set(modules) < set(chosen("config.json", "modules.json", "model.safetensors", *modules))


@pytest.mark.parametrize(
    "name", ["../config.json", "/config.json", "a\\b.json", "1_a/../b.json", "a\0.json", "x" * 300]
)
def test_names_that_are_not_plain_are_left_out(name: str) -> None:
    assert name not in chosen("config.json", "model.safetensors", name)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["config.json", "pytorch_model.bin", "tf_model.h5"], r"weights as \*\.bin, \*\.h5"),
        (["model-q4.gguf"], r"weights as \*\.gguf"),
        (["README.md"], "no weights at all"),
    ],
)
def test_without_safetensors_what_there_is_is_told(names: list[str], told: str) -> None:
    with pytest.raises(BadInputError, match=told) as caught:
        chosen(*names)
    assert caught.value.code == "no_safetensors"


def test_without_a_config_no_engine_can_load_it() -> None:
    with pytest.raises(BadInputError, match=r"no config\.json"):
        chosen("model.safetensors")


def test_other_bytes_have_another_part_name() -> None:
    first, second = Remote("a.json", 1, git_sha1="1" * 40), Remote("a.json", 1, git_sha1="2" * 40)
    assert first.part != second.part
    third, fourth = Remote("1_a/b.json", commit="c" * 40), Remote("1_a/b.json", commit="main")
    assert third.part != fourth.part
    assert third.part.endswith("-1_a--b.json")
    assert all(is_part(file.part) for file in (first, second, third, fourth))
    assert not any(map(is_part, ("config.json", "manifest.json", "my-thesis.tex")))


def test_what_was_fetched_survives_the_disk(tmp_path: Path) -> None:
    fetched = Fetched("c0ffee", (File("config.json", 5, ""),), ("1-config.json",))
    fetched.save(tmp_path)
    assert Fetched.load(tmp_path) == fetched
