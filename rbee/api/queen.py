"""What the queen's routes are."""

from __future__ import annotations

from typing import Any

from rbee.api.operation import TEXT, Operation
from rbee.queen.openai import ANTHROPIC_ROUTES, EMBEDDINGS, MODELS, NO_WORK, ROUTES
from rbee.wire import messages as m

OPENAI_ERROR: dict[str, Any] = {
    "title": "OpenAIError",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
ANTHROPIC_ERROR: dict[str, Any] = {
    "title": "AnthropicError",
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
PASSED_ON: dict[str, Any] = {
    "title": "PassedOn",
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": {"type": "string", "minLength": 1, "maxLength": 4096},
        "stream": {"type": ["boolean", "null"], "default": False},
        "priority": {
            "type": ["integer", "null"],
            "default": 0,
            "description": "A lower one is served earlier.",
        },
    },
}
SESSION = {
    "X-Session-Id": "What belongs to the same goes to the same worker while that has a free slot."
}
WAITS = (404, 408, 409, 499, 502, 503, 507)
TASK_EVENTS = (m.Queued, m.Narration, m.Started, m.Token, m.End, m.Error)

HEALTH = Operation("GET", m.HEALTH, "Tell that it lives.", gives={200: m.Health}, is_open=True)
METRICS = Operation("GET", m.METRICS, "Figures for Prometheus.", gives={200: TEXT})
OPENAPI = Operation("GET", m.OPENAPI, "This document.")
SHUTDOWN = Operation(
    "POST", m.SHUTDOWN, "End this daemon and all that it has started.", gives={202: None}
)

TASKS = [
    Operation(
        "POST", m.TASKS,
        "Run one prompt.\nThe answer is its events, to the last one, `end` or `error`; closing the "
        "connection cancels it. With `Prefer: respond-async` it is kept, and answered with 202.",
        takes=m.TaskRequest, gives={200: m.Token, 202: m.TaskAccepted}, refuses=WAITS,
        events=TASK_EVENTS, only_events=True, headers={**SESSION, "Prefer": "`respond-async`"},
        tells_overhead=True,
    ),
    Operation("GET", m.TASKS, "List the jobs that are known.", gives={200: list[m.TaskInfo]}),
    Operation(
        "GET", m.TASKS + "/{job}", "Tell how a job stands.", gives={200: m.TaskInfo},
        refuses=(404, 410),
    ),
    Operation(
        "DELETE", m.TASKS + "/{job}",
        "Cancel a job.\nOne that has ended, or never was, is fine.", gives={204: None},
    ),
    Operation(
        "GET", m.TASKS + "/{job}/events",
        "Read the events of a job that is kept, from any of them on.\n204: the last one was seen.",
        gives={200: m.Token, 204: None}, refuses=(404, 409, 410), events=TASK_EVENTS,
        only_events=True, headers={"Last-Event-ID": "the number of the last event that was seen"},
        tells_overhead=True,
    ),
]  # fmt: skip

NODES = [
    Operation("GET", m.QUEEN_NODES, "List the nodes.", gives={200: list[m.NodeInfo]}),
    Operation(
        "POST", m.QUEEN_NODES, "Add a node, once it was reached over SSH.", takes=m.AddNode,
        gives={201: m.NodeInfo}, refuses=(404, 409, 502, 503),
    ),
    Operation(
        "GET", m.QUEEN_NODES + "/{name}", "Tell of one node.", gives={200: m.NodeInfo},
        refuses=(404,),
    ),
    Operation(
        "PATCH", m.QUEEN_NODES + "/{name}", "Change a node.", takes=m.UpdateNode,
        gives={200: m.NodeInfo}, refuses=(404, 409),
    ),
    Operation(
        "DELETE", m.QUEEN_NODES + "/{name}", "Forget a node.", gives={204: None},
        refuses=(404, 409),
    ),
]  # fmt: skip

HIVES = [
    Operation("GET", m.QUEEN_HIVES, "List the hives.", gives={200: list[m.HiveInfo]}),
    Operation(
        "POST", m.QUEEN_HIVES, "Find or start the hive of a node.", takes=m.StartHive,
        gives={200: m.HiveInfo}, events=(m.Narration, m.HiveInfo, m.Error),
        refuses=(404, 409, 502, 503),
    ),
    Operation(
        "DELETE", m.QUEEN_HIVES + "/{node}", "Stop the hive of a node, if the queen owns it.",
        gives={204: None}, refuses=(404, 409, 502, 503),
    ),
]  # fmt: skip

WORKERS = [
    Operation("GET", m.QUEEN_WORKERS, "List the workers.", gives={200: list[m.WorkerInfo]}),
    Operation(
        "POST", m.QUEEN_WORKERS,
        "Start a worker where it suits best.\nThe answer comes when it loads; as events, when it "
        "is ready.",
        takes=m.StartWorker, gives={202: m.WorkerInfo, 200: m.WorkerInfo},
        events=(m.Narration, m.WorkerInfo, m.Error), refuses=(404, 409, 502, 503, 507),
    ),
    Operation(
        "POST", m.QUEEN_EXPLAIN, "Tell how suitable each node is for a worker.",
        takes=m.StartWorker, gives={200: list[m.NodeChoice]}, refuses=(404, 409, 502, 503),
    ),
    Operation(
        "DELETE", m.QUEEN_WORKERS + "/{worker}", "Stop a worker.", gives={204: None},
        refuses=(404, 502, 503),
    ),
    Operation(
        "POST", m.QUEEN_WORKER_READY, "The call of a worker that is ready, passed on by its hive.",
        takes=m.WorkerReady, gives={204: None}, refuses=(404,),
    ),
]  # fmt: skip

MODELS_ON_DISK = [
    Operation("GET", m.QUEEN_MODELS, "List the models on all nodes.",
              gives={200: list[m.ModelInfo]}),
    Operation(
        "POST", m.QUEEN_MODELS, "Fetch a model to a node.", takes=m.PullModel,
        gives={200: m.Pulled}, events=(m.Narration, m.Pulled, m.Error), only_events=True,
        refuses=(404, 409, 502, 503, 507),
    ),
    Operation(
        "DELETE", m.QUEEN_MODELS + "/{node}/{model}", "Remove a model from a node's disk.",
        gives={204: None}, refuses=(404, 409, 502, 503),
    ),
]  # fmt: skip

PASSED = (
    "Passed on to a worker of the model, untouched both ways.\nThe body and the answer are vLLM's "
    "business"
)
STREAMED = "; with `stream` the answer is events, as that API has them."


def _passed_on(path: str, error: dict[str, Any]) -> Operation:
    streams = path not in (EMBEDDINGS, *NO_WORK)
    return Operation(
        "POST", path, PASSED + (STREAMED if streams else "."), takes=PASSED_ON, gives={200: Any},
        refuses=(*WAITS, 405, 422, 501), may_stream=streams, headers=SESSION, takes_key=True,
        tells_overhead=True, error=error,
    )  # fmt: skip


OTHERS = [
    Operation(
        "GET", MODELS, "List the models that can be asked for.", gives={200: Any}, takes_key=True,
        tells_overhead=True, error=OPENAI_ERROR,
    ),
    *(_passed_on(path, OPENAI_ERROR) for path in ROUTES),
    *(_passed_on(path, ANTHROPIC_ERROR) for path in ANTHROPIC_ROUTES),
]  # fmt: skip

OPERATIONS = [
    *TASKS, *OTHERS, *WORKERS, *HIVES, *NODES, *MODELS_ON_DISK,
    Operation("GET", m.QUEEN_TARGETS, "Where Prometheus finds all daemons (`http_sd_configs`)."),
    HEALTH, METRICS, OPENAPI, SHUTDOWN,
]  # fmt: skip
ABOUT = (
    "The orchestrator: models on all machines of a cluster behind one address. Every answer "
    "carries `X-Request-Id`; 429 and 503 carry `Retry-After`. Keys of `config.toml` open the "
    "routes of `/v1` and `/v2/tasks` only."
)
