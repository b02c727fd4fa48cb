"""Tokens are counted from what answers tell, and from nothing that only looks like it."""

from __future__ import annotations

import json

import pytest

from rbee.queen.usage import is_end, tokens_told

CHUNK = b'data: {"choices":[{"delta":{"content":"a"}}],"usage":null}\n\n'
LAST = (
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"total_tokens":12,"completion_tokens":5}}\n\n'
)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (b'{"choices":[],"usage":{"prompt_tokens": 7, "completion_tokens": 5}}', (7, 5)),
        (CHUNK + LAST + b"data: [DONE]\n\n", (7, 5)),
        (CHUNK + b"data: [DONE]\n\n", (0, 0)),
        (b'event: message_delta\ndata: {"usage":{"input_tokens":7,"output_tokens":5}}\n\n', (7, 5)),
        (b'event: end\ndata: {"tokens_in":7,"tokens_out":5,"stop_reason":"stop"}\n\n', (7, 5)),
        (b'{"data":[],"usage":{"prompt_tokens":7,"total_tokens":7}}', (7, 0)),
        (json.dumps({"content": '"usage":{"prompt_tokens":9}'}).encode(), (0, 0)),
        (b'{"usage":{"prompt_tokens":-7,"completion_tokens":1.5e9}}', (0, 1)),
        (b"", (0, 0)),
    ],
)  # fmt: skip
def test_tokens_are_those_that_the_last_usage_tells(text: bytes, tokens: tuple[int, int]) -> None:
    assert tokens_told(text) == tokens


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        (LAST + b"data: [DONE]\n\n", True),
        (b'event: message_stop\ndata: {"type":"message_stop"}\n\n', True),
        (b"event: response.completed\ndata: {}\n\n", True),
        (b'event: end\ndata: {"tokens_in":7}\n\n', True),
        (CHUNK, False),
        (b'data: {"text":"event: end\\n"}\n\n', False),
    ],
)
def test_the_last_event_of_each_api_is_known(text: bytes, ends: bool) -> None:
    assert is_end(text) is ends
