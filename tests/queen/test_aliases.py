"""What a request's alias adds to it: only what the request leaves open."""

from __future__ import annotations

import os
import time
from typing import Any

import attrs
import pytest

from rbee.alias import Defaults
from rbee.config import ConfigError
from rbee.home import Home
from rbee.queen.aliases import Aliases, with_defaults, with_start_defaults
from rbee.wire.messages import Message, PullModel, StartWorker, TaskRequest

DEFAULTS = Defaults(
    temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, repetition_penalty=1.1, max_tokens=7,
    stop=("END",), seed=3, max_model_len=512, dtype="float32", kv_cache=1 << 28, max_num_seqs=2,
    backend="cpu", device="1", engine="echo", keep_alive=60.0,
    engine_args={"rate": "5", "load": "1"},
)  # fmt: skip
REQUEST = TaskRequest("bee", prompt="hello")
RAW = attrs.evolve(REQUEST, raw=True)
SYSTEM, USER = Message("system", "You are a bee."), Message("user", "hello")


def wire_name(name: str) -> str:
    return "kv_cache_bytes" if name == "kv_cache" else name


@pytest.mark.parametrize("name", [name for name in DEFAULTS.said() if name != "engine_args"])
def test_a_default_holds_where_the_request_says_nothing(name: str) -> None:
    field = wire_name(name)
    default = getattr(DEFAULTS, name)
    assert getattr(with_defaults(REQUEST, DEFAULTS), field) == default
    assert getattr(with_defaults(REQUEST, Defaults()), field) == getattr(REQUEST, field)
    other: Any = ("x",) if name == "stop" else "cuda" if isinstance(default, str) else 0
    said = attrs.evolve(REQUEST, **{field: other})
    assert getattr(with_defaults(said, DEFAULTS), field) == other


def test_engine_options_are_merged_one_by_one() -> None:
    said = attrs.evolve(REQUEST, engine_args={"rate": "9"})
    assert with_defaults(said, DEFAULTS).engine_args == {"rate": "9", "load": "1"}


@pytest.mark.parametrize(
    ("said", "messages"),
    [
        (REQUEST, (SYSTEM, USER)),
        (TaskRequest("bee", messages=(USER,)), (SYSTEM, USER)),
        (TaskRequest("bee", messages=(Message("system", "mine"), USER)), None),
        (RAW, None),
        (TaskRequest("bee"), None),  # refused as ever
    ],
)
def test_the_system_message_comes_first_unless_there_is_one_or_no_template(
    said: TaskRequest, messages: tuple[Message, ...] | None
) -> None:
    filled = with_defaults(said, Defaults(system=SYSTEM.content))
    if messages is None:
        assert filled == said
    else:
        assert (filled.prompt, filled.messages) == (None, messages)


def test_a_worker_is_started_with_the_start_options() -> None:
    filled = with_start_defaults(StartWorker("bee", dtype="bfloat16"), DEFAULTS)
    assert filled == StartWorker(
        "bee", engine="echo", backend="cpu", device="1", max_model_len=512, dtype="bfloat16",
        kv_cache_bytes=1 << 28, max_num_seqs=2, engine_args=DEFAULTS.engine_args, keep_alive=60.0,
    )  # fmt: skip


def test_the_file_is_read_again_when_it_has_changed(home: Home) -> None:
    aliases = Aliases(home.config_file)
    assert aliases.fill(REQUEST) is REQUEST
    home.config_file.write_text("[aliases.bee]\nsource = 'pypi:a'\nseed = 1\n")
    assert aliases.fill(REQUEST).seed == 1
    assert "pypi:a" in aliases.meanings("bee")
    assert aliases.fill(TaskRequest("pypi:a")).seed is None  # it was not called by the alias
    home.config_file.write_text("[aliases.bee]\nsource = 'pypi:a'\nseed = 22\n")
    assert aliases.fill_start(StartWorker("bee")) == StartWorker("bee")
    assert aliases.fill(REQUEST).seed == 22
    home.config_file.write_text("[aliases.bee]\nseed = 22\n")
    with pytest.raises(ConfigError, match=r"aliases\.bee"):
        aliases.fill(REQUEST)
    home.config_file.unlink()
    assert aliases.fill(REQUEST) is REQUEST


def test_a_queen_may_have_an_engine_for_what_says_none(home: Home) -> None:
    home.config_file.write_text("[aliases.bee]\nsource = 'pypi:a'\nengine = 'vllm'\n")
    aliases = Aliases(home.config_file, "echo")
    assert aliases.fill(REQUEST).engine == "vllm"
    assert aliases.fill(TaskRequest("any")).engine == "echo"
    assert aliases.fill_start(StartWorker("any")).engine == "echo"
    assert aliases.fill_start(StartWorker("any", engine="vllm")).engine == "vllm"


def test_a_request_costs_one_stat(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.config_file.write_text("[aliases.bee]\nsource = 'tinyllama'\nseed = 1\n")
    aliases = Aliases(home.config_file)
    aliases.fill(REQUEST)
    looked: list[object] = []
    stat = os.stat
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr(os, "stat", lambda path: looked.append(path) or stat(path))
    began = time.thread_time()
    for _ in range(100):
        aliases.fill(REQUEST)
        aliases.meanings("bee")
    seconds = time.thread_time() - began
    monkeypatch.undo()
    assert looked == [home.config_file] * 100
    assert seconds / 100 < 0.0002


def test_what_an_alias_stands_for_here_goes_along(home: Home) -> None:
    home.config_file.write_text("[aliases]\nbee = ['/models/bee', 'hf:org/bee']\n")
    aliases = Aliases(home.config_file)
    sources = ("/models/bee", "hf:org/bee")
    for request in (StartWorker("bee"), PullModel("bee"), PullModel("org/bee")):
        spelt = aliases.spell_out(request)
        assert (spelt.model, spelt.alias, spelt.sources) == (request.model, "bee", sources)
    assert aliases.spell_out(PullModel("hf:org/wasp")) == PullModel("hf:org/wasp")
    said = PullModel("bee", alias="bee", sources=("hf:mine/bee",))
    assert aliases.spell_out(said) == said
