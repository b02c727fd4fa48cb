"""Text of others made fit for a line of ours: for logs and terminals."""

from __future__ import annotations

import re

# What could end a line, steer a terminal, show text in another order than it is in, or be no text.
_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return ``text`` on one line, with what is not to be shown as it is in escapes."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """Do the same and keep the lines that it has."""
    return "\n".join(map(printable, text.split("\n")))
