"""The worker's own figures; its engine's stand beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from rbee import __version__
from rbee.metrics import LONG, SHORT, Histogram, Labels, counter, gauge, histogram
from rbee.model import WorkerSpec

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

OUTCOMES = ("done", "cancelled", "failed", "refused")


@attrs.define(eq=False)
class Figures:
    """Counters since the worker's start, of what came to `/execute`."""

    jobs: Counter[str] = attrs.field(factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    firsts: Histogram = attrs.field(factory=lambda: Histogram(LONG))
    gaps: Histogram = attrs.field(factory=lambda: Histogram(SHORT))

    def collect(self) -> Iterable[Metric]:
        jobs: dict[Labels, float] = {(name,): self.jobs[name] for name in OUTCOMES}
        yield counter("rbee_worker_jobs_total", "Jobs by their end.", jobs, ("outcome",))
        yield counter("rbee_worker_tokens_in_total", "Of the jobs' prompts.", self.tokens_in)
        yield counter("rbee_worker_tokens_out_total", "Generated for jobs.", self.tokens_out)
        yield histogram(
            "rbee_worker_ttft_seconds",
            "From a job's request to its first token.",
            {(): self.firsts},
        )
        yield histogram(
            "rbee_worker_inter_token_seconds",
            "Between two steps of the engine for a job: a token, or a few.",
            {(): self.gaps},
        )


def collect_state(
    spec: WorkerSpec, *, ready: bool, jobs_running: int, engine_running: int
) -> Iterable[Metric]:
    """Make the figures of what a worker is, and is at, now."""
    labels = ("version", "worker", "model", "engine", "backend")
    values = (__version__, spec.id, spec.model, spec.engine, spec.backend)
    yield gauge("rbee_worker_info", "What it is.", {values: 1}, labels)
    yield gauge("rbee_worker_ready", "Whether it takes work.", int(ready))
    yield gauge("rbee_worker_jobs_running", "Jobs in progress.", jobs_running)
    yield gauge(
        "rbee_worker_engine_requests", "Requests in the engine, of its own API too.", engine_running
    )
