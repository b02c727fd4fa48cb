"""Which worker takes a job: a pure choice over what is known."""

from __future__ import annotations

from collections.abc import Iterable

from rbee.model import WorkerState
from rbee.wire.messages import StartWorker, TaskRequest, WorkerInfo

DEFAULT_ENGINE = "vllm"
OPTIONS = ("max_model_len", "dtype", "kv_cache_bytes", "max_num_seqs")
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
        and _was_started_so(worker, request)
    )


def _was_started_so(worker: WorkerInfo, request: TaskRequest) -> bool:
    """Tell whether a worker has the options that a request names."""
    asked = {name: getattr(request, name) for name in OPTIONS}
    return request.engine_args.items() <= worker.engine_args.items() and all(
        value is None or getattr(worker, name) == value for name, value in asked.items()
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
        engine_args=request.engine_args,
        keep_alive=request.keep_alive,
        **{name: getattr(request, name) for name in OPTIONS},
    )
