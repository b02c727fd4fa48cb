"""What pip's last words mean: the same in every program that runs it."""

from __future__ import annotations

import enum
import re


class PipFailure(enum.Enum):
    """Why pip failed, in words."""

    NO_PIP = "this Python has no pip"
    FULL = "the disk is full"
    OFFLINE = "the package index does not answer"
    MISSING = "pip finds no package that fits"
    OTHER = "pip failed"


_SAID = (
    (PipFailure.NO_PIP, re.compile("No module named pip")),
    (PipFailure.FULL, re.compile("No space left|Disk quota exceeded")),
    (
        PipFailure.OFFLINE,
        re.compile(
            "NewConnectionError|ConnectTimeout|ReadTimeout|name resolution|Max retries"
            "|ConnectionError|ProxyError|Network is unreachable|Connection (refused|reset)"
        ),
    ),
    (
        PipFailure.MISSING,
        re.compile(
            "No matching distribution|Could not find a version|not a valid|Invalid req"
            "|Cannot install"
        ),
    ),
)


def why_failed(tail: str) -> PipFailure:
    """Tell from the last lines of its output why pip has failed."""
    return next((failure for failure, said in _SAID if said.search(tail)), PipFailure.OTHER)


def last_line(tail: str) -> str:
    return tail.splitlines()[-1].removeprefix("ERROR: ") if tail else ""
