"""Requests are refused with the value, the bound and what there was."""

import math

import pytest

from rbee.errors import BadInputError
from rbee.wire.messages import ExecuteRequest, Message
from rbee.worker.limits import DEFAULT_MAX_TOKENS, answer_budget, check_request


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": None}, "exactly one"),
        ({"messages": (Message("user", "x"),)}, "exactly one"),
        ({"prompt": ""}, "empty"),
        ({"prompt": None, "messages": ()}, "empty"),
        ({"temperature": -1.0}, "temperature must be at least 0: -1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p must be greater than 0 and at most 1: 0"),
        ({"top_p": 1.5}, "1.5"),
        ({"top_k": -2}, "-2"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens must be at least 1: 0"),
        ({"stop": ("",)}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"job_id": "j\r\nset-cookie: x"}, "job_id must be"),
        ({"job_id": "bücher"}, "job_id must be"),
        ({"job_id": "j" * 129}, "job_id must be"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(given, said):
    with pytest.raises(BadInputError, match=said):
        check_request(ExecuteRequest(**{"job_id": "j", "prompt": "hello"} | given))


def test_a_reasonable_request_passes():
    check_request(
        ExecuteRequest(
            "j", "hello", temperature=0.0, top_p=1.0, top_k=0, min_p=0.0,
            repetition_penalty=1.1, max_tokens=1, stop=("x",), seed=-1,
        )
    )  # fmt: skip


def test_the_answer_gets_what_is_left_of_the_context_up_to_a_cap():
    assert answer_budget(None, 10, 100) == 90
    assert answer_budget(None, 10, 10**6) == DEFAULT_MAX_TOKENS
    assert answer_budget(90, 10, 100) == 90


def test_what_does_not_fit_is_refused_with_both_numbers():
    with pytest.raises(BadInputError, match=r"91.*100.*10.*90"):
        answer_budget(91, 10, 100)
    with pytest.raises(BadInputError, match=r"100 tokens.*100"):
        answer_budget(None, 100, 100)
