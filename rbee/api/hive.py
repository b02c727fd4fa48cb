"""What a hive's routes are."""

from __future__ import annotations

from rbee.api.operation import TEXT, Operation
from rbee.api.queen import HEALTH, METRICS, OPENAPI, SHUTDOWN
from rbee.wire import messages as m

OPERATIONS = [
    Operation(
        "GET", m.HIVE_WORKERS,
        "List the workers; as events, all of them and then every change and heartbeat.",
        gives={200: list[m.WorkerInfo]},
        events=(m.WorkerIds, m.WorkerInfo, m.WorkerNarration, m.Heartbeat),
    ),
    Operation(
        "POST", m.HIVE_WORKERS, "Start a worker.", takes=m.StartWorker, gives={202: m.WorkerInfo},
        refuses=(404, 409, 503, 507),
    ),
    Operation(
        "DELETE", m.HIVE_WORKERS + "/{worker}", "Stop a worker.", gives={204: None},
        refuses=(404,),
    ),
    Operation(
        "POST", m.HIVE_WORKER_READY, "The call of a worker that is ready.", takes=m.WorkerReady,
        gives={204: None}, refuses=(404,),
    ),
    Operation(
        "POST", m.HIVE_WORKER_PROGRESS, "What a worker is at that is not ready yet.",
        takes=m.WorkerNarration, gives={204: None}, refuses=(404,),
    ),
    Operation(
        "PUT", m.HIVE_OWNERS + "/{queen}", "A queen lives; without that its workers are stopped.",
        takes=m.OwnerLease, gives={204: None}, refuses=(409,),
    ),
    Operation(
        "DELETE", m.HIVE_OWNERS + "/{queen}", "A queen goes, and her workers with her.",
        gives={204: None},
    ),
    Operation("GET", m.HIVE_DEVICES, "List what workers can run on.",
              gives={200: list[m.Device]}),
    Operation("GET", m.HIVE_MODELS, "List the models on disk.", gives={200: list[m.ModelInfo]}),
    Operation(
        "POST", m.HIVE_MODELS, "Fetch a model.", takes=m.PullModel, gives={200: m.Pulled},
        events=(m.Narration, m.Pulled, m.Error), only_events=True,
        refuses=(404, 409, 502, 503, 507),
    ),
    Operation(
        "DELETE", m.HIVE_MODELS + "/{model}", "Remove a model from the disk.", gives={204: None},
        refuses=(404, 409),
    ),
    Operation(
        "GET", m.HIVE_LOGS + "/{worker}", "The end of a worker's log.", gives={200: TEXT},
        refuses=(404,),
    ),
    HEALTH, METRICS, OPENAPI, SHUTDOWN,
]  # fmt: skip
ABOUT = "The pool manager of one node: it starts workers, watches them and stops them."
