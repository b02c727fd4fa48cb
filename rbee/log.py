"""The log of our programs: stderr, which is a file for every owned process; a line a record."""

from __future__ import annotations

import logging
import os
import re
import sys

log = logging.getLogger(__name__)

QUIET = ("httpx", "httpcore", "asyncio", "asyncssh")

# What could end a line, steer a terminal or show text in another order than it is in.
_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class OneLine(logging.Formatter):
    """Keep a record on one line, and its traceback indented below.

    Peers choose names, paths and texts that come to be logged; none of them can look like a line
    of ours.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return _escape(super().formatMessage(record))

    def formatException(self, ei: object) -> str:  # noqa: N802 - logging's name
        lines = super().formatException(ei).split("\n")  # type: ignore[arg-type]
        return "\n".join(f"  {_escape(line)}" for line in lines)


def _escape(text: str) -> str:
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def configure_logging(title: str) -> None:
    """Log to stderr, as ``RBEE_LOG_LEVEL`` says.

    The level is for what we log: at DEBUG, libraries log what they send and receive, which holds
    the token.
    """
    name = os.environ.get("RBEE_LOG_LEVEL", "").upper() or "INFO"
    names = logging.getLevelNamesMapping()
    level = names.get(name, logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        OneLine(f"%(asctime)s {title}[%(process)d] %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=max(level, logging.INFO), handlers=[handler], force=True)
    logging.getLogger("rbee").setLevel(level)
    for noisy in QUIET:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if name not in names:
        log.warning("RBEE_LOG_LEVEL=%s is no level (%s); INFO is taken", name, ", ".join(names))
