"""The hive's figures: its workers, how they end, and what its node has left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rbee import __version__, metrics
from rbee.hive.pulse import Pulse
from rbee.hive.workers import Workers
from rbee.web.router import App, Request, Response
from rbee.wire import messages

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


def add_metrics(app: App, workers: Workers, pulse: Pulse) -> None:
    """Add the route with the figures of a hive."""

    def collect() -> Iterable[Metric]:
        yield metrics.gauge("rbee_hive_info", "The version.", {(__version__,): 1}, ("version",))
        yield from app.requests.collect("hive")
        yield from _collect_workers(workers)
        yield from workers.cleaned.collect("hive")
        yield from _collect_node(pulse)

    async def show(request: Request) -> Response:
        return Response(await metrics.scrape(collect), content_type=metrics.CONTENT_TYPE)

    app.add("GET", messages.METRICS, show)


def _collect_workers(workers: Workers) -> Iterable[Metric]:
    states = metrics.by_state(info.state for info in workers.infos())
    yield metrics.gauge("rbee_hive_workers", "Workers of this hive by state.", states, ("state",))
    yield metrics.counter(
        "rbee_hive_worker_ends_total", "Workers that have ended, by the state they ended in.",
        workers.ends, ("state",),
    )  # fmt: skip


def _collect_node(pulse: Pulse) -> Iterable[Metric]:
    beat = pulse.heartbeat()
    yield metrics.gauge("rbee_hive_memory_bytes", "Memory of the node.", beat.memory_total)
    yield metrics.gauge("rbee_hive_memory_free_bytes", "What of it is free.", beat.memory_free)
    yield metrics.gauge("rbee_hive_disk_free_bytes", "Free where models are kept.", beat.disk_free)
