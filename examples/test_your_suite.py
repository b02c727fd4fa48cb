"""A test suite that uses the fixtures of rbee: install it, and they are there.

    pytest examples/test_your_suite.py

The echo engine answers with the words of the prompt, so these tests need neither a model nor a
GPU. ``rbee_vllm`` has a real model; its tests are skipped where vLLM is not installed.
"""

import pytest

import rbee


def summarise(client: rbee.Client, text: str, model: str = "echo") -> str:
    """Stand in for what is to be tested: code of yours that asks a model."""
    return client.infer(model, text, max_tokens=4).text


def test_a_summary_is_short(rbee_client: rbee.Client) -> None:
    assert len(summarise(rbee_client, "one two three four five six").split()) == 4


@pytest.mark.rbee(model="echo?rate=5")
def test_a_reader_who_leaves_cancels_the_answer(rbee_cluster: rbee.Cluster) -> None:
    for text in rbee_cluster.client.stream("echo?rate=5", "one two", max_tokens=500).text():
        assert text == "one"
        break


def test_an_openai_client_is_sent_here(openai_base_url: str, openai_api_key: str) -> None:
    assert openai_base_url.endswith("/v1")
    assert openai_api_key
