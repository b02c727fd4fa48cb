"""Which models vLLM looks for a processor of; what a chat answers is held by the real clients."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rbee.testing.tiny_model import write_tiny_model
from rbee.worker import templates
from rbee.worker.templates import may_have_processor, skip_processors


@pytest.fixture(autouse=True)
def auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for transformers, which may not be imported beside a broken torchvision."""
    for parent in ("transformers", "transformers.models", "transformers.models.auto"):
        monkeypatch.setitem(sys.modules, parent, SimpleNamespace(__path__=[]))
    module = SimpleNamespace(PROCESSOR_MAPPING_NAMES={"qwen2_vl": "Qwen2VLProcessor"})
    monkeypatch.setitem(sys.modules, "transformers.models.auto.processing_auto", module)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path)


def change(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_a_model_of_text_has_no_processor(model: Path) -> None:
    assert not may_have_processor(model)


@pytest.mark.parametrize("name", templates.FILES)
def test_a_file_of_a_processor_tells_of_one(model: Path, name: str) -> None:
    (model / name).write_text("{}")
    assert may_have_processor(model)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("config.json", {"model_type": "qwen2_vl"}),
        ("config.json", {"processor_class": "LlavaProcessor"}),
        ("tokenizer_config.json", {"processor_class": "LlavaProcessor"}),
        ("config.json", {"auto_map": {"AutoProcessor": "its.Processor"}}),
    ],
)
def test_a_configuration_tells_of_one(model: Path, name: str, keys: dict[str, object]) -> None:
    change(model / name, **keys)
    assert may_have_processor(model)


def test_what_cannot_be_read_may_have_one(tmp_path: Path) -> None:
    assert may_have_processor(tmp_path)
    assert may_have_processor(Path("org/model"))


def test_it_is_looked_for_only_where_one_may_be(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = SimpleNamespace(_try_get_processor_chat_template=lambda tokenizer, **_: "a template")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "vllm.renderers", SimpleNamespace(__path__=[], hf=hf))
    monkeypatch.setitem(sys.modules, "vllm.renderers.hf", hf)
    skip_processors()
    skip_processors()
    look = hf._try_get_processor_chat_template
    assert not hasattr(look.__wrapped__, "__wrapped__")
    assert look(SimpleNamespace(name_or_path=str(model)), revision=None) is None
    (model / templates.FILES[0]).write_text("{}")
    assert look(SimpleNamespace(name_or_path=str(model)), revision=None) == "a template"


def test_a_vllm_without_that_function_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "vllm.renderers", SimpleNamespace(__path__=[], hf=hf))
    skip_processors()
    assert vars(hf) == {}
