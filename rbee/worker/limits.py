"""What a request may ask for; each refusal names the value, the bound and what there was."""

from __future__ import annotations

import math
import re

from rbee.errors import BadInputError
from rbee.hints import infer
from rbee.wire.messages import ExecuteRequest

DEFAULT_MAX_TOKENS = 2048  # when the request names none; a runaway answer ends here
MAX_STOPS = 16
_JOB_ID = re.compile("[!-~]{1,128}")


def check_request(request: ExecuteRequest) -> None:
    """Refuse what no engine accepts, before anything starts."""
    if not _JOB_ID.fullmatch(request.job_id):  # it comes back as a header
        raise BadInputError("job_id must be 1 to 128 printable ASCII characters without spaces")
    _check_prompt(request)
    _check_range("temperature", request.temperature, low=0)
    _check_range("min_p", request.min_p, low=0, high=1)
    _check_range("repetition_penalty", request.repetition_penalty, above=0)
    _check_range("top_p", request.top_p, above=0, high=1)
    if request.top_k is not None and request.top_k < 1 and request.top_k not in (0, -1):
        raise BadInputError(f"top_k must be at least 1 (0 or -1 switches it off): {request.top_k}")
    if request.max_tokens is not None and request.max_tokens < 1:
        raise BadInputError(
            f"max_tokens must be at least 1: {request.max_tokens}",
            hint=infer("--max-tokens", 64),
        )
    if len(request.stop) > MAX_STOPS or "" in request.stop:
        raise BadInputError(f"stop takes at most {MAX_STOPS} strings, none of them empty")
    if request.seed is not None and not -(2**63) <= request.seed < 2**63:
        raise BadInputError(f"seed must fit into 64 bits: {request.seed}")


def _check_prompt(request: ExecuteRequest) -> None:
    if (request.prompt is None) == (request.messages is None):
        raise BadInputError("exactly one of prompt and messages is needed")
    if request.prompt == "":
        raise BadInputError("the prompt is empty", hint='--prompt "Hello"')
    if request.messages is not None and not any(m.content for m in request.messages):
        raise BadInputError("the messages are empty: at least one needs content")


def _check_range(
    name: str,
    value: float | None,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
) -> None:
    if value is None or (low <= value <= high and value > above and math.isfinite(value)):
        return
    bounds = [f"greater than {above:g}"] if above > -math.inf else [f"at least {low:g}"]
    bounds += [f"at most {high:g}"] if high < math.inf else []
    raise BadInputError(f"{name} must be {' and '.join(bounds)}: {value:g}")


def shorter(context: int) -> str:
    """Return the hint for a prompt that is too long; a token is some three characters."""
    return f"head -c {max(1, 2 * context)} FILE | {infer(prompt='-')}"


def check_length(tokens_in: int, context: int) -> None:
    """Refuse a prompt that leaves no room for a single token of answer."""
    if tokens_in < 1:
        raise BadInputError("the prompt is empty: it has 0 tokens")
    if tokens_in >= context:
        raise BadInputError(
            f"the prompt has {tokens_in} tokens; the context holds {context}, "
            "at least one of them for the answer",
            hint=shorter(context),
        )


def answer_budget(max_tokens: int | None, tokens_in: int, context: int) -> int:
    """Return how many tokens the answer may have; the default is what is left, capped.

    Raises:
        BadInputError: prompt and answer do not fit into the context together.
    """
    check_length(tokens_in, context)
    left = context - tokens_in
    if max_tokens is None:
        return min(left, DEFAULT_MAX_TOKENS)
    if max_tokens > left:
        raise BadInputError(
            f"max_tokens is {max_tokens}, but the context holds {context} tokens and the prompt "
            f"takes {tokens_in}: at most {left} are left",
            hint=infer("--max-tokens", left),
        )
    return max_tokens
