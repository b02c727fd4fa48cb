"""A record is one line, whatever a peer made it say; libraries do not tell what they send."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from rbee.log import QUIET, configure_logging


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Leave the loggers as they were; pytest's handlers are not to be closed."""
    root, names = logging.getLogger(), ("", "rbee", *QUIET)
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in names}
    root.handlers = []
    yield
    root.handlers = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


FORGED = "x\n2026-01-01 00:00:00,000 queen-rbee[1] ERROR rbee: forged"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\x1b[2K", "\0"])
def test_what_a_peer_sends_makes_no_line_and_no_command(
    capsys: pytest.CaptureFixture[str], end: str
) -> None:
    configure_logging("queen-rbee")
    logging.getLogger("rbee.x").info("job %s: café\tok", f"a{end}b")
    logged = capsys.readouterr().err
    assert logged.endswith(f"rbee.x: job a{end.encode('unicode_escape').decode()}b: café\tok\n")
    assert len(logged.splitlines()) == 1


def test_a_traceback_is_indented_with_all_that_it_quotes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("queen-rbee")
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("rbee.x").warning("failed", exc_info=True)
    first, *more = capsys.readouterr().err.splitlines()
    assert first.endswith("rbee.x: failed")
    assert more[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") for line in more)


@pytest.mark.parametrize(
    ("level", "is_debug"), [("debug", True), ("INFO", False), ("", False), ("nonsense", False)]
)
def test_the_level_is_for_what_we_log(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    level: str,
    is_debug: bool,
) -> None:
    monkeypatch.setenv("RBEE_LOG_LEVEL", level)
    configure_logging("queen-rbee")
    for name in ("httpcore.http11", "hpack.hpack", "asyncssh", "h2.connection"):
        logging.getLogger(name).debug("authorization: Bearer secret")
    logging.getLogger("rbee.x").debug("ours")
    logged = capsys.readouterr().err
    assert "secret" not in logged
    assert ("ours" in logged) is is_debug
    assert ("RBEE_LOG_LEVEL=NONSENSE is no level" in logged) is (level == "nonsense")
