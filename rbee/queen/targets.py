"""Where Prometheus finds a cluster's figures: workers come and go, on any free port.

The answer is what ``http_sd_configs`` reads, with the addresses that the queen herself uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rbee.model import WorkerState
from rbee.queen.hives import Hives
from rbee.web.exchange import Address
from rbee.web.router import App, Request, Response
from rbee.wire import messages

THERE = {WorkerState.LOADING.value, WorkerState.READY.value, WorkerState.STOPPING.value}


def add_target_routes(app: App, hives: Hives) -> None:
    async def show(request: Request) -> Response:
        return Response(json.dumps(list(_targets(hives))).encode())

    app.add("GET", messages.QUEEN_TARGETS, show)


def _targets(hives: Hives) -> Iterator[dict[str, Any]]:
    yield _target(hives.url, component="queen")
    for info in hives.infos():
        if (hive := hives.running(info.node)) is not None:
            yield _target(str(hive.client.base_url), component="hive", node=info.node)
    for worker in hives.workers:
        hive = hives.running(worker.node)
        if hive is not None and worker.url and worker.state in THERE:
            yield _target(
                hive.way_to(worker.url), component="worker", node=worker.node,
                worker=worker.worker_id, model=worker.model,
            )  # fmt: skip


def _target(url: str, **labels: str) -> dict[str, Any]:
    address = Address.parse(url)
    host = f"[{address.host}]" if ":" in address.host else address.host
    return {"targets": [f"{host}:{address.port}"], "labels": labels}
