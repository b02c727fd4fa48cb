from __future__ import annotations

from pathlib import Path

import pytest

from rbee.alias import Defaults
from rbee.config import Config, ConfigError, HiveConfig, QueenConfig, WorkerFlags, load_config


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_a_missing_file_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    assert load_config(path) == Config(source=str(path))


def test_its_own_tables_become_values_and_the_rest_stays_flags(tmp_path: Path) -> None:
    config = load_config(
        written(
            tmp_path,
            """
            temperature = 0.5
            [infer]
            max-tokens = 7
            [aliases]
            one = "pypi:a"
            two = ["pypi:a", "file:///b"]
            [queen]
            port = 9000
            hive-port = 9300
            [hive]
            node = "n1"
            [worker]
            served-name = ["a"]
            """,
        )
    )
    assert config.aliases == {"one": ("pypi:a",), "two": ("pypi:a", "file:///b")}
    assert config.queen == QueenConfig(port=9000, hive_port=9300)
    assert config.hive == HiveConfig(node="n1")
    assert config.worker == WorkerFlags(served_name=("a",))
    assert config.flags == {"temperature": 0.5, "infer": {"max-tokens": 7}}


def test_an_alias_may_be_a_table_with_defaults(tmp_path: Path) -> None:
    config = load_config(
        written(
            tmp_path,
            """
            [aliases]
            plain = "pypi:a"
            [aliases.bee]
            source = ["hf:org/repo", "plain"]
            system = "You are a bee."
            temperature = 1
            top-k = 40
            stop = "END"
            kv_cache = "512M"
            keep-alive = "1h"
            engine_args = { gpu_memory_utilization = 0.5, enable-lora = true, "load-format" = "x" }
            """,
        )
    )
    assert config.aliases == {"plain": ("pypi:a",), "bee": ("hf:org/repo", "plain")}
    assert config.defaults == {
        "bee": Defaults(
            system="You are a bee.",
            temperature=1.0,
            top_k=40,
            stop=("END",),
            kv_cache=512 << 20,
            keep_alive=3600.0,
            engine_args={
                "gpu-memory-utilization": "0.5", "enable-lora": "true", "load-format": "x",
            },
        )
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[queen]\nprot = 1", "queen.prot"),
        ("[hive]\nport = 'x'", "expected int"),
        ("[queen]\nhome = '/x'", "queen.home"),
        ("[hive]\nowned = true", "hive.owned"),
        ("[worker]\nport = 'x'", "expected int"),
        ("queen = 3", "'queen'"),
        ("aliases = 3", "'aliases'"),
        ("[aliases]\na = 3", "aliases.a"),
        ("[aliases]\na = []", "aliases.a"),
        ("[aliases.a]\ntop_k = 1", "'aliases.a' needs source"),
        ("[aliases.a]\nsource = 3", "aliases.a.source"),
        ("[aliases.a]\nsource = 'x'\ntop_q = 1", "'aliases.a.top_q' is unknown"),
        ("[aliases.a]\nsource = 'x'\ntop_k = 'x'", "'aliases.a' is wrong: expected int, got str"),
        ("[aliases.a]\nsource = 'x'\ntop_k = 'x'", "$.top_k"),
        ("[aliases.a]\nsource = 'x'\ntop-p = 1.5", "'aliases.a.top_p' must be above 0"),
        ("[aliases.a]\nsource = 'x'\nkeep_alive = 'soon'", "'soon' is not a time"),
        ("[aliases.a]\nsource = 'x'\nkv_cache = '1X'", "'1X' is not a size"),
        ("[aliases.a]\nsource = 'x'\nbackend = 'tpu'", "cpu or cuda"),
        ("[aliases.a]\nsource = 'x'\nengine_args = 'x'", "aliases.a"),
        ("x = ", "is not TOML"),
        ("x = 1\nx = 2", "is not TOML"),
    ],
)
def test_what_is_wrong_is_told_with_the_file_and_the_key(
    tmp_path: Path, text: str, told: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in caught.value.message
    assert told in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.mkdir()
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(path)
    path = tmp_path / "latin.toml"
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(path)
