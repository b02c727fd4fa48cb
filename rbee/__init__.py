"""rbee: one LLM inference cluster from every machine you can SSH into.

``open_cluster`` embeds a cluster in a trio program and ``Cluster`` in any other; ``AsyncClient``
and ``Client`` talk to a queen that runs. Each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rbee.blocking import Client, Job
    from rbee.client import AsyncClient
    from rbee.cluster import AsyncCluster, EmbeddedQueen, open_cluster, serve_queen
    from rbee.errors import RbeeError
    from rbee.job import AsyncJob
    from rbee.stream import Answer
    from rbee.threaded import Cluster
    from rbee.wire.messages import (
        AddNode,
        End,
        Message,
        Narration,
        Queued,
        Started,
        StartWorker,
        TaskInfo,
        TaskRequest,
        Token,
    )

__version__ = "0.1.0"

_HOMES = {
    "AddNode": "rbee.wire.messages",
    "Answer": "rbee.stream",
    "AsyncClient": "rbee.client",
    "AsyncCluster": "rbee.cluster",
    "AsyncJob": "rbee.job",
    "Client": "rbee.blocking",
    "Cluster": "rbee.threaded",
    "EmbeddedQueen": "rbee.cluster",
    "End": "rbee.wire.messages",
    "Job": "rbee.blocking",
    "Message": "rbee.wire.messages",
    "Narration": "rbee.wire.messages",
    "Queued": "rbee.wire.messages",
    "RbeeError": "rbee.errors",
    "StartWorker": "rbee.wire.messages",
    "Started": "rbee.wire.messages",
    "TaskInfo": "rbee.wire.messages",
    "TaskRequest": "rbee.wire.messages",
    "Token": "rbee.wire.messages",
    "open_cluster": "rbee.cluster",
    "serve_queen": "rbee.cluster",
}

__all__ = [
    "AddNode",
    "Answer",
    "AsyncClient",
    "AsyncCluster",
    "AsyncJob",
    "Client",
    "Cluster",
    "EmbeddedQueen",
    "End",
    "Job",
    "Message",
    "Narration",
    "Queued",
    "RbeeError",
    "StartWorker",
    "Started",
    "TaskInfo",
    "TaskRequest",
    "Token",
    "__version__",
    "open_cluster",
    "serve_queen",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'rbee' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
