"""Figures that are cheap to keep, and their exposition for Prometheus.

They are plain numbers: prometheus_client is imported by the first scrape, never by who only keeps
them, and knows of ours for the length of one scrape. So the registry of a program that embeds us,
and its ``PROMETHEUS_MULTIPROC_DIR``, stay its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import attrs
import trio

from rbee.model import WorkerState

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

# Upper bounds of buckets, in seconds.
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
TINY = (0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)

NAMES = 100  # names, as of models, that have figures of their own; all further ones share theirs
OTHER = "other"

Labels = tuple[str, ...]


class Histogram:
    """Counts of values up to each of ``bounds``, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


@attrs.define(eq=False)
class ByName:
    """Histograms by the name of a route or a model, of which there are at most `NAMES` + 1."""

    bounds: Sequence[float]
    _of: dict[Labels, Histogram] = attrs.field(factory=dict)

    def of(self, name: str) -> Histogram:
        if (found := self._of.get((name,))) is None:
            labels = (bounded(name, self._of),)
            found = self._of.setdefault(labels, Histogram(self.bounds))
        return found

    def all(self) -> Mapping[Labels, Histogram]:
        return self._of


def bounded(name: str, known: Mapping[Labels, Any]) -> str:
    """Return the label for a name: clients name any model, and each costs memory for ever."""
    return name if (name,) in known or len(known) < NAMES else OTHER


def by_state(states: Iterable[str]) -> dict[Labels, float]:
    """Count workers by state; states that none is in are told as 0."""
    counts = Counter(states)
    names = {*counts, *(state.value for state in WorkerState)}
    return {(name,): counts[name] for name in names}


# exposition ----------------------------------------------------------------------------------
def gauge(
    name: str, text: str, values: Mapping[Labels, float] | float, labels: Sequence[str] = ()
) -> Metric:
    from prometheus_client.metrics_core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(name, text, labels=labels), values)


def counter(
    name: str, text: str, values: Mapping[Labels, float] | float, labels: Sequence[str] = ()
) -> Metric:
    """Make a counter; its ``name`` ends in ``_total``."""
    from prometheus_client.metrics_core import CounterMetricFamily

    return _filled(CounterMetricFamily(name, text, labels=labels), values)


def _filled(family: Any, values: Mapping[Labels, float] | float) -> Metric:
    of = values if isinstance(values, Mapping) else {(): values}
    for labels, value in sorted(of.items()):
        family.add_metric(labels, value)
    return family  # type: ignore[no-any-return]


def histogram(
    name: str, text: str, values: Mapping[Labels, Histogram], labels: Sequence[str] = ()
) -> Metric:
    from prometheus_client.metrics_core import HistogramMetricFamily

    family = HistogramMetricFamily(name, text, labels=labels)
    for of, one in sorted(values.items()):
        bounds = (*map(str, one.bounds), "+Inf")
        buckets = list(zip(bounds, accumulate(one.counts), strict=True))
        family.add_metric(of, buckets, sum_value=one.sum)
    return family


def expose(collect: Callable[[], Iterable[Metric]]) -> bytes:
    """Return the figures as text, through a registry that nobody else sees."""
    from prometheus_client.exposition import generate_latest
    from prometheus_client.registry import CollectorRegistry

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(collect))
    return generate_latest(registry)


async def scrape(collect: Callable[[], Iterable[Metric]]) -> bytes:
    """Do as `expose`; what that needs is imported off the loop: 0.05 s of CPU, once."""
    await trio.to_thread.run_sync(_import_exposition)
    return expose(collect)


def _import_exposition() -> None:
    import prometheus_client  # noqa: F401


@attrs.define(eq=False)
class _Collector:
    _collect: Callable[[], Iterable[Metric]]

    def describe(self) -> Iterator[Metric]:
        """Tell of no names: else registering would collect."""
        return iter(())

    def collect(self) -> Iterable[Metric]:
        return self._collect()
