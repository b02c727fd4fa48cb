"""``--engine-arg``: what reaches vLLM's parser, and how its refusals are told."""

from __future__ import annotations

import pytest

from rbee.errors import BadInputError
from rbee.worker.engine_args import (
    OURS,
    SERVER,
    check_ours,
    engine_options,
    option_word,
    refused,
    spread_lists,
)

KNOWN = (
    "--block-size",
    "--enable-lora",
    "--no-enable-lora",
    "--hf-overrides",
    "--max-model-len",
    "--port",
)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("block_size", "32", "--block-size=32"),
        ("--block-size", "32", "--block-size=32"),
        ("enable-lora", "", "--enable-lora"),
        ("enable-lora", "True", "--enable-lora"),
        ("enable-lora", "false", "--no-enable-lora"),
        ("no-enable-lora", "true", "--no-enable-lora"),
        ("no_enable_lora", "false", "--enable-lora"),
        ("hf-overrides", '{"a_b": 1}', '--hf-overrides={"a_b": 1}'),
        ("hf_overrides.a_b", "true", "--hf-overrides.a_b=true"),
        ("compilation-config.mode", "3", "--compilation-config.mode=3"),
    ],
)
def test_keys_and_switches_become_words_of_vllm(key: str, value: str, word: str) -> None:
    assert [option_word(*item) for item in engine_options({key: value}).items()] == [word]


@pytest.mark.parametrize(
    "key", ["kv_cache_memory_bytes", "--dtype", "model.x", "dtype+", "no-dtype"]
)
def test_what_rbee_decides_is_refused_with_the_flag_that_sets_it(key: str) -> None:
    with pytest.raises(BadInputError, match="is decided by rbee; use --") as caught:
        check_ours(engine_options({key: "true"}))
    assert caught.value.hint.startswith("rbee-keeper infer --")


def test_every_flag_that_is_named_instead_is_one_of_the_command_line() -> None:
    from rbee.keeper.flags import every_flag

    assert {flag.removeprefix("--") for flag in OURS.values()} <= every_flag()


@pytest.mark.parametrize("key", sorted(SERVER))
def test_options_of_a_server_that_does_not_run_are_refused(key: str) -> None:
    with pytest.raises(BadInputError, match="vLLM's own server"):
        check_ours({key: "x"})


@pytest.mark.parametrize(
    ("told", "said", "hint"),
    [
        ("unrecognized arguments: --block-sise=1",
         "no option block-sise; did you mean --engine-arg block-size", "--engine-arg block-size=1"),
        ("unrecognized arguments: --max-model=5", "did you mean --max-model-len",
         "--max-model-len=5"),
        ("unrecognized arguments: --pirt=5", "no option pirt$", "without --engine-arg pirt"),
        ("unrecognized arguments: --zzz", "no option zzz", "without --engine-arg zzz"),
        ("unrecognized arguments: --no-block-size", "block-size is no switch",
         "without --engine-arg no-block-size"),
        ("argument --block-size: invalid int value: 'x'",
         "refuses --engine-arg block-size: invalid int value: 'x'", "infer --help"),
        ("argument --speculative-config/-sc: Value x cannot be converted to <function loads at "
         "0x7f513ae46980>.", "speculative-config: Value x cannot be converted to JSON.",
         "infer --help"),
        ("argument --enable-lora/--no-enable-lora: ignored explicit argument 'yes'",
         r"enable-lora: it is a switch \(needed: true or false\), got 'yes'", "enable-lora=true"),
        ("argument --block-size: expected one argument", "block-size: it needs a value",
         "infer --help"),
        ("something new", "something new", "--help"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_option_and_what_is_accepted(told: str, said: str, hint: str) -> None:
    error = refused(told, KNOWN)
    with pytest.raises(BadInputError, match=said):
        raise error
    assert hint in error.hint


def test_lists_are_spread_for_options_that_take_several() -> None:
    several = {"--lora-modules"}
    given = ['--lora-modules=["a=/x", {"b": 1}]', "--lora-modules=a=/x", '--other=["a"]', "--flag"]
    assert spread_lists(given, several) == [
        "--lora-modules", "a=/x", '{"b": 1}', "--lora-modules=a=/x", '--other=["a"]', "--flag",
    ]  # fmt: skip
