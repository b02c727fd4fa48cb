"""What the flags of a worker's start may say."""

import pytest

from rbee.errors import BadInputError
from rbee.keeper.flags import StartFlags
from rbee.keeper.start import engine_args, start_settings


def test_an_option_of_the_engine_is_a_key_with_a_value_or_a_switch():
    given = ("block_size=16", "--enable-lora", 'hf-overrides={"a": "b=c"}', "hf_config.a_b+=1")
    wanted = {"block-size": "16", "enable-lora": "true", "hf-overrides": '{"a": "b=c"}'}
    assert engine_args(given) == wanted | {"hf-config.a_b+": "1"}


def test_an_option_that_is_given_twice_is_refused():
    with pytest.raises(BadInputError, match="block-size is given twice"):
        engine_args(("block_size=16", "block-size=32"))


@pytest.mark.parametrize("text", ["", "=x", "a b=1"])
def test_what_is_no_option_is_refused(text):
    with pytest.raises(BadInputError, match="is not an option"):
        engine_args((text,))


def test_counts_below_one_are_refused():
    with pytest.raises(BadInputError, match="--max-num-seqs must be at least 1, got 0"):
        start_settings(StartFlags(max_num_seqs=0))


def test_what_may_fetch_a_model_takes_our_way_to_a_hub_along(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert start_settings(StartFlags())["hub"].token == "hf_mine"
