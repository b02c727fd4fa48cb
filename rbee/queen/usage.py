"""How many tokens an answer says that it took: as it passes by, of any of the APIs."""

from __future__ import annotations

import re

# What stands in a text has its quotes escaped, so no text of a model can look like it.
_IN = re.compile(rb'"(?:prompt_tokens|input_tokens|tokens_in)":\s*(\d{1,9})\b')
_OUT = re.compile(rb'"(?:completion_tokens|output_tokens|tokens_out)":\s*(\d{1,9})\b')
_USAGE = (b'"usage":', b'"tokens_in":')
# The events with which streams of the APIs end.
_END = re.compile(rb"data: \[DONE\]|event: (?:message_stop|response\.completed|end\n)")
REACH = 1024  # bytes behind the word in which the numbers stand


def tokens_told(text: bytes) -> tuple[int, int]:
    """Return the tokens of prompt and answer that the last usage in ``text`` tells; 0 if none."""
    at = max(map(text.rfind, _USAGE))
    if at < 0:
        return 0, 0
    part = text[at : at + REACH]
    return _number(_IN, part), _number(_OUT, part)


def is_end(text: bytes) -> bool:
    """Tell whether the last event of a stream is in ``text``."""
    return _END.search(text) is not None


def _number(pattern: re.Pattern[bytes], text: bytes) -> int:
    found = pattern.search(text)
    return int(found[1]) if found else 0
