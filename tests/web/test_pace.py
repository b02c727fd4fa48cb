"""When pieces come is measured, and what the last two were."""

from __future__ import annotations

import pytest

from rbee.metrics import Histogram
from rbee.web.pace import Pace

BOUNDS = (1.0, 10.0)


def test_the_first_piece_counts_from_the_request_and_the_others_from_the_one_before() -> None:
    firsts, gaps = Histogram(BOUNDS), Histogram(BOUNDS)
    pace = Pace(100.0, firsts, gaps, skip=1)
    for data, now in ((b"started", 101.0), (b"a", 105.0), (b"b", 105.5), (b"c", 107.0)):
        pace.piece(data, now)
    assert (firsts.counts, firsts.sum) == ([0, 1, 0], 5.0)
    assert (gaps.counts, gaps.sum) == ([1, 1, 0], 2.0)
    assert pace.tail == b"bc"


def test_what_has_waited_for_the_client_is_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = Histogram(BOUNDS)
    pace = Pace(100.0, Histogram(BOUNDS), gaps)
    pace.piece(b"a", 101.0)
    monkeypatch.setattr("rbee.web.pace.time.monotonic", lambda: 150.0)
    pace.rest()
    pace.piece(b"b", 150.5)
    assert gaps.sum == 0.5


def test_of_what_is_no_stream_only_the_end_is_kept() -> None:
    pace = Pace(100.0)
    pace.piece(b"a", 101.0)
    pace.piece(b"b", 102.0)
    assert (pace.tail, pace.last) == (b"ab", 0.0)
