"""Which worker takes a job: a pure choice over what is known."""

from __future__ import annotations

from collections.abc import Iterable

from rbee.model import WorkerState
from rbee.wire.messages import StartWorker, TaskRequest, WorkerInfo

DEFAULT_ENGINE = "vllm"
_ORDER = (WorkerState.READY.value, WorkerState.LOADING.value, WorkerState.STARTED.value)


def fits(worker: WorkerInfo, request: TaskRequest) -> bool:
    """Tell whether a worker serves what a request asks for; what it does not name is free."""
    names = {worker.model, *worker.served_names}
    return (
        request.model in names
        and worker.state in _ORDER
        and (request.node is None or worker.node == request.node)
        and (request.engine or DEFAULT_ENGINE) == worker.engine
        and (request.backend is None or worker.backend == request.backend)
        and (request.device is None or worker.device == request.device)
    )


def choose(workers: Iterable[WorkerInfo], request: TaskRequest) -> WorkerInfo | None:
    """Take a ready worker before one that is still on its way; None if there is neither."""
    fitting = [worker for worker in workers if fits(worker, request)]
    return min(fitting, key=lambda worker: _ORDER.index(worker.state), default=None)


def start_for(request: TaskRequest, owner: str) -> StartWorker:
    """Say what to start when no worker fits."""
    return StartWorker(
        model=request.model,
        engine=request.engine or DEFAULT_ENGINE,
        backend=request.backend,
        device=request.device,
        owner=owner,
        node=request.node,
    )
