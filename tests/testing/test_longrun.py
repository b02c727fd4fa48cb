"""The long run tells what grows from what only came, went, or warmed up."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from rbee.testing.longrun import MIB, Sample, run, slope, trends
from rbee.wire.messages import StartWorker


def grows(name: str, value: Callable[[int], float], cycles: int = 100) -> bool:
    samples: list[Sample] = [{"cycle": n, name: value(n)} for n in range(1, cycles + 1)]
    (trend,) = trends(samples)
    return trend.grows


GROWS: dict[str, tuple[str, Callable[[int], float]]] = {
    "one of each": ("hive fds", lambda n: 12 + n),
    "one of ten": ("hive fds", lambda n: 12 + n // 10),
    "memory": ("zygote rss", lambda n: 100 * MIB + n * 0.2 * MIB),
    "a file of fifty": ("paths", lambda n: 4 + n / 50),
}
DOES_NOT: dict[str, tuple[str, Callable[[int], float]]] = {
    "it comes and goes": ("hive fds", lambda n: 12 + n % 2),
    "it was warming up": ("hive fds", lambda n: min(12 + n, 40)),
    "it falls": ("hive fds", lambda n: 40 - n // 7),
    "a pool": ("hive threads", lambda n: 2 + (n % 10 < 3)),
    "an allocator": ("zygote rss", lambda n: (100 + math.log(n)) * MIB),
    "the journal is written anew": ("journal", lambda n: 600 + 80 * (n % 3)),
}


@pytest.mark.parametrize("case", GROWS)
def test_what_rises_in_the_second_half_grows(case: str) -> None:
    assert grows(*GROWS[case])


@pytest.mark.parametrize("case", DOES_NOT)
def test_what_only_comes_and_goes_does_not_grow(case: str) -> None:
    assert not grows(*DOES_NOT[case])


def test_the_slope_is_that_of_the_line_that_fits_best() -> None:
    assert slope([1, 2, 3], [5, 7, 9]) == pytest.approx(2)
    assert slope([1, 2, 3, 4], [0, 1, 1, 0]) == pytest.approx(0)
    assert slope([1], [1]) == 0


def test_a_measure_that_was_not_always_seen_is_not_judged() -> None:
    samples = [
        {"cycle": n, "paths": 4.0} | ({"zygote fds": 6.0} if n != 9 else {}) for n in range(10)
    ]
    assert [trend.name for trend in trends(samples)] == ["paths"]


@pytest.mark.slow
@pytest.mark.alone
async def test_a_hive_does_not_grow_while_workers_come_and_go() -> None:
    longrun = await run(StartWorker("echo", engine="echo", keep_alive=-1), 14)
    found = trends(longrun.samples)
    assert [trend for trend in found if trend.grows] == []
    assert {trend.name for trend in found} >= {"guard A fds", "hive threads", "zygote pss", "paths"}
