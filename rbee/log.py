"""The log of our programs: stderr, which is a file for every owned process; a line a record."""

from __future__ import annotations

import logging
import os
import sys

from rbee.printable import printable
from rbee.trace import running_id

log = logging.getLogger(__name__)

QUIET = ("httpx", "httpcore", "asyncio", "asyncssh")


class OneLine(logging.Formatter):
    """Keep a record on one line, and its traceback indented below.

    Peers choose names, paths and texts that come to be logged; none of them can look like a line
    of ours. The id of the request that is being answered stands at its end.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        text, request = super().formatMessage(record), running_id()
        return printable(f"{text} [{request}]" if request and request not in text else text)

    def formatException(self, ei: object) -> str:  # noqa: N802 - logging's name
        lines = super().formatException(ei).split("\n")  # type: ignore[arg-type]
        return "\n".join(f"  {printable(line)}" for line in lines)


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
