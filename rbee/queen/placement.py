"""Which worker takes a job: a pure choice over what is known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable

from rbee.model import DEFAULT_ENGINE, WorkerState
from rbee.wire.messages import StartWorker, TaskRequest, WorkerInfo

Meanings = Callable[[str], Collection[str]]
"""All names of what a name means, itself among them."""
GENERATE = "generate"
OPTIONS = ("max_model_len", "dtype", "kv_cache_bytes", "max_num_seqs")
_ORDER = (WorkerState.READY.value, WorkerState.LOADING.value, WorkerState.STARTED.value)


def itself(name: str) -> Collection[str]:
    return (name,)


def fits(
    worker: WorkerInfo, request: TaskRequest | StartWorker, meanings: Meanings = itself
) -> bool:
    """Tell whether a worker serves what a request asks for; what it does not name is free."""
    return (
        not _names(worker, meanings).isdisjoint(meanings(request.model))
        and worker.state in _ORDER
        and worker.task == (request.task if isinstance(request, StartWorker) else GENERATE)
        and (request.node is None or worker.node == request.node)
        and (request.engine or DEFAULT_ENGINE) == worker.engine
        and (request.backend is None or worker.backend == request.backend)
        and (request.device is None or worker.device == request.device)
        and _was_started_so(worker, request)
    )


def kind_of(request: TaskRequest | StartWorker) -> Hashable:
    """Return what is the same for requests that the same workers fit."""
    task = request.task if isinstance(request, StartWorker) else GENERATE
    placed = (request.model, task, request.node, request.engine, request.backend, request.device)
    options = tuple(getattr(request, name) for name in OPTIONS)
    return (*placed, *options, tuple(sorted(request.engine_args.items())))


def is_called(worker: WorkerInfo, names: Collection[str]) -> bool:
    """Tell whether a worker serves one of the names, as far as it tells itself."""
    return worker.model in names or not set(worker.served_names).isdisjoint(names)


def _names(worker: WorkerInfo, meanings: Meanings) -> set[str]:
    """Return what a worker is called: before its model is found, all that it may turn out to be."""
    return {worker.model, *worker.served_names, *meanings(worker.model)}


def _was_started_so(worker: WorkerInfo, request: TaskRequest | StartWorker) -> bool:
    """Tell whether a worker has the options that a request names."""
    for name in OPTIONS:
        value = getattr(request, name)
        if value is not None and value != getattr(worker, name):
            return False
    return request.engine_args.items() <= worker.engine_args.items()


def choose(
    workers: Iterable[WorkerInfo],
    request: TaskRequest | StartWorker,
    meanings: Meanings = itself,
) -> WorkerInfo | None:
    """Take a ready worker before one that is still on its way; None if there is neither."""
    fitting = (worker for worker in workers if fits(worker, request, meanings))
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
        hub=request.hub,
        **{name: getattr(request, name) for name in OPTIONS},
    )
