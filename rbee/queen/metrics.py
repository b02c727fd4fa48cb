"""The queen's figures: what she passes on, and what she knows of hives and workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import attrs

from rbee import __version__, metrics
from rbee.clean import Clean
from rbee.metrics import LONG, SHORT, TINY, ByName, Histogram, Labels, bounded
from rbee.queen.shelf import Shelf
from rbee.queen.usage import is_end, tokens_told
from rbee.trace import Trace, current
from rbee.web.out import has_events
from rbee.web.pace import Pace
from rbee.web.router import App, Request, Response
from rbee.web.upstream import Answer
from rbee.wire import messages
from rbee.wire.messages import HiveInfo, WorkerInfo

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

MODEL = ("model",)


@attrs.define(eq=False)
class Figures:
    """What one queen measures of what she passes on."""

    _firsts: ByName = attrs.field(factory=lambda: ByName(LONG))
    _gaps: ByName = attrs.field(factory=lambda: ByName(SHORT))
    _queued: ByName = attrs.field(factory=lambda: ByName(LONG))
    _overhead: Histogram = attrs.field(factory=lambda: Histogram(TINY))
    _tokens_in: Counter[Labels] = attrs.field(factory=Counter)
    _tokens_out: Counter[Labels] = attrs.field(factory=Counter)

    def pace(self, answer: Answer, *, skip: int = 0) -> Pace:
        """Measure an answer of a worker; ``skip``: pieces of it before the first token."""
        is_stream = answer.head.status == 200 and has_events(answer.head.headers)
        answer.pace = self.pace_of_stream(skip=skip) if is_stream else Pace(current().began)
        return answer.pace

    def pace_of_stream(self, *, skip: int = 0) -> Pace:
        trace = current()
        gaps, firsts = self._gaps.of(trace.model), self._firsts.of(trace.model)
        return Pace(trace.began, firsts, gaps, skip=skip)

    def take_end(self, pace: Pace) -> None:
        """Take the end of an answer that has passed: its tokens, if it told them."""
        trace, tail = current(), pace.tail
        trace.is_told = trace.is_told or is_end(tail)
        tokens_in, tokens_out = tokens_told(tail)
        if tokens_in or tokens_out:
            label = (bounded(trace.model, self._tokens_in),)
            self._tokens_in[label] += tokens_in
            self._tokens_out[label] += tokens_out

    def take(self, trace: Trace) -> None:
        """Take what a request that has ended came to."""
        if trace.model:
            self._queued.of(trace.model).observe(trace.queued)
            if trace.overhead is not None:
                self._overhead.observe(trace.overhead)

    def collect(self) -> Iterable[Metric]:
        yield metrics.histogram(
            "rbee_queen_ttft_seconds",
            "From a request's head to the first token of a stream, waiting for a worker included.",
            self._firsts.all(), MODEL,
        )  # fmt: skip
        yield metrics.histogram(
            "rbee_queen_inter_token_seconds",
            "Between two pieces of a stream as they come from the worker: a token, or a few.",
            self._gaps.all(), MODEL,
        )  # fmt: skip
        yield metrics.histogram(
            "rbee_queen_queue_seconds",
            "For which a request waited for a worker that could take it, its start included.",
            self._queued.all(), MODEL,
        )  # fmt: skip
        yield metrics.histogram(
            "rbee_queen_overhead_seconds",
            "That the queen itself took until the answer of a worker was passed on.",
            {(): self._overhead},
        )
        yield metrics.counter(
            "rbee_queen_tokens_in_total", "Of prompts, as the answers told.",
            self._tokens_in, MODEL,
        )  # fmt: skip
        yield metrics.counter(
            "rbee_queen_tokens_out_total", "Of answers, as they told.", self._tokens_out, MODEL
        )


class Waiting(Protocol):
    """Who knows how many wait, and keeps the figures (`rbee.queen.assignments`)."""

    figures: Figures

    def waiting(self) -> int:
        """Return how many requests wait for a worker."""
        ...


class Running(Protocol):
    """Who knows the jobs (`rbee.queen.jobs`)."""

    shelf: Shelf

    def __len__(self) -> int: ...


class Holdings(Protocol):
    """Who knows the hives and workers (`rbee.queen.hives`)."""

    cleaned: Clean

    @property
    def workers(self) -> Iterable[WorkerInfo]: ...

    def infos(self) -> Sequence[HiveInfo]: ...


def add_metrics(app: App, assignments: Waiting, hives: Holdings, jobs: Running) -> None:
    """Add the route with the figures of a queen."""
    app.requests.seen = assignments.figures.take

    def collect() -> Iterable[Metric]:
        yield metrics.gauge("rbee_queen_info", "The version.", {(__version__,): 1}, ("version",))
        yield from app.requests.collect("queen")
        yield from assignments.figures.collect()
        yield from _collect_present(assignments, hives, jobs)
        yield from hives.cleaned.collect("queen")

    async def show(request: Request) -> Response:
        return Response(await metrics.scrape(collect), content_type=metrics.CONTENT_TYPE)

    app.add("GET", messages.METRICS, show)


def _collect_present(assignments: Waiting, hives: Holdings, jobs: Running) -> Iterable[Metric]:
    state = ("state",)
    yield metrics.gauge(
        "rbee_queen_requests_waiting", "Requests that wait for a worker.", assignments.waiting()
    )
    yield metrics.gauge("rbee_queen_jobs", "Jobs that have not ended.", len(jobs))
    yield metrics.gauge(
        "rbee_queen_kept_jobs", "Jobs of the asynchronous form that can be asked for.",
        len(jobs.shelf),
    )  # fmt: skip
    yield metrics.gauge("rbee_queen_kept_bytes", "What they take.", jobs.shelf.size)
    workers = metrics.by_state(info.state for info in hives.workers)
    yield metrics.gauge("rbee_queen_workers", "Workers of all nodes by state.", workers, state)
    states: Counter[Labels] = Counter((hive.state,) for hive in hives.infos())
    yield metrics.gauge("rbee_queen_hives", "Hives by state.", states, state)
