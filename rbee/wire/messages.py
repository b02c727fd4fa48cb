"""Routes and bodies, for clients and servers alike.

Bodies are attrs classes; `rbee.wire.codec` turns them into JSON and back and refuses unknown keys.
"""

from __future__ import annotations

from typing import Any

import attrs

from rbee.model import KEEP_ALIVE

# routes ---------------------------------------------------------------------------------------
HEALTH = "/health"
METRICS = "/metrics"
OPENAPI = "/openapi.json"
QUEEN_TARGETS = "/v2/targets"
SHUTDOWN = "/v1/admin/shutdown"
EXECUTE = "/execute"
READY = "/v1/ready"
TASKS = "/v2/tasks"
QUEEN_NODES = "/v2/nodes"
QUEEN_HIVES = "/v2/hives"
QUEEN_WORKERS = "/v2/workers"
QUEEN_EXPLAIN = "/v2/workers/explain"
QUEEN_MODELS = "/v2/models"
QUEEN_WORKER_READY = "/v1/orchestrator/worker-ready"
HIVE_WORKERS = "/v1/workers"
HIVE_WORKER_READY = "/v1/workers/ready"
HIVE_WORKER_PROGRESS = "/v1/workers/progress"
HIVE_OWNERS = "/v1/owners"
HIVE_DEVICES = "/v1/devices"
HIVE_LOGS = "/v1/logs"
HIVE_MODELS = "/v1/models"

JOB_ID_HEADER = "x-rbee-job-id"
WORKER_ID_HEADER = "x-rbee-worker-id"  # on /execute: whom it is meant for, ports are used again


@attrs.frozen
class Health:
    """``GET /health`` of every daemon. ``owner`` is ``operator`` or the owner's id."""

    component: str
    id: str
    version: str
    owner: str
    home: str
    pid: int
    state: str = "ready"


@attrs.frozen
class Hello:
    """A daemon's first line on stdout: it is listening and the next request would succeed."""

    component: str
    id: str
    version: str
    pid: int
    url: str
    capabilities: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class DaemonStart:
    """What an owner tells a daemon on the first lifeline line (``start {json}``).

    ``host``: the address to listen on, where only the node knows its own; "" leaves it to --host.
    ``engine``: of the worker that will be asked for at once; "" if that is not known.
    """

    owner: str
    token: str
    run_dir: str
    queen_url: str = ""
    queen_id: str = ""
    lease: float = 10.0
    host: str = ""
    engine: str = ""


@attrs.frozen
class RunFile:
    """``run/queen.json`` and ``run/hive.json``: where a daemon of this home is to be found."""

    component: str
    id: str
    url: str
    pid: int
    start_time: int
    boot_id: str
    version: str
    owner: str
    token_file: str


@attrs.frozen
class HiveInfo:
    """One hive as its queen sees it; ``GET /v2/hives`` lists them.

    Attributes:
        state: ``ready``, ``stopping``, ``unresponsive`` while no heartbeat comes; after its end
            ``stuck`` while something of it is left, ``unverified`` while that cannot be seen.
        left: what is left of it, in words.
        last_seen: seconds since its last sign of life.
        workers: how many it has, of all its queens.
        memory_total, memory_free, disk_free: of its node, in bytes; 0 until it has told.
    """

    node: str
    hive_id: str
    url: str
    state: str
    owner: str
    pid: int
    version: str
    last_seen: float = 0.0
    workers: int = 0
    memory_total: int = 0
    memory_free: int = 0
    disk_free: int = 0
    left: str = ""


@attrs.frozen
class StartHive:
    """``POST`` to a queen's hives. Answer: `HiveInfo` of the node's hive, found or started.

    To whoever accepts events, narration comes first.
    """

    node: str = "localhost"


# nodes ----------------------------------------------------------------------------------------
@attrs.frozen
class NodeInfo:
    """One machine of the cluster; ``GET /v2/nodes`` lists them, ``localhost`` first.

    Attributes:
        host, port, user, key, ssh_alias: as registered; ``key`` is a path on the queen's machine.
        address: where it is, for people.
        rbee_path: the directory of its rbee; "" for ``localhost``.
        environment: of its hive; values that are named like secrets are hidden.
        transport: ``direct`` or ``ssh``.
        status: ``unknown``, ``ready``, ``unreachable`` or ``unusable``.
        last_seen, created: seconds since the epoch; 0 is never.
        last_error: why it is not ready.
        capabilities: what `rbee-hive detect` printed there when it was last asked.
    """

    name: str
    host: str = ""
    port: int | None = None
    user: str = ""
    key: str = ""
    ssh_alias: str = ""
    address: str = ""
    rbee_path: str = ""
    environment: dict[str, str] = attrs.field(factory=dict)
    transport: str = "direct"
    status: str = "unknown"
    last_seen: float = 0.0
    last_error: str = ""
    capabilities: dict[str, Any] = attrs.field(factory=dict)
    created: float = 0.0


@attrs.frozen
class AddNode:
    """``POST`` to a queen's nodes. Answer: 201 and `NodeInfo`, once the node has been tried.

    "" and None stand for the default. ``ssh_alias`` excludes ``host``, ``port``, ``user``, ``key``.
    ``accept_new_host_key`` takes an unknown host key; the error without it has the fingerprint. A
    node that lacks only a rbee of the queen's version is added as ``unusable``.
    """

    name: str
    host: str = ""
    port: int | None = None
    user: str = ""
    key: str = ""
    ssh_alias: str = ""
    rbee_path: str = ""
    environment: dict[str, str] = attrs.field(factory=dict)
    transport: str = ""
    accept_new_host_key: bool = False


@attrs.frozen
class UpdateNode:
    """``PATCH`` of a node. Answer: `NodeInfo`.

    None leaves a value as it is; "" (``port``: 0) brings back the default. ``environment`` is put
    on top of what there is; an empty value removes its variable.
    """

    host: str | None = None
    port: int | None = None
    user: str | None = None
    key: str | None = None
    ssh_alias: str | None = None
    rbee_path: str | None = None
    environment: dict[str, str] | None = None
    transport: str | None = None


# models of requests ---------------------------------------------------------------------------
@attrs.frozen
class HubAccess:
    """How a request's model may be fetched, from its sender's environment; for this request only.

    What is left open is as the environment of the hive says.

    Attributes:
        endpoint: ``HF_ENDPOINT``.
        token: ``HF_TOKEN``; kept nowhere, shown nowhere.
        offline: ``HF_HUB_OFFLINE``; None where that is not set.
    """

    endpoint: str = ""
    token: str = attrs.field(default="", repr=False)
    offline: bool | None = None


# workers --------------------------------------------------------------------------------------
@attrs.frozen
class StartWorker:
    """``POST`` to a hive's or a queen's workers. Answer: 202 and `WorkerInfo`.

    ``engine``: "" leaves it to the model's alias, then to the default. ``keep_alive``: seconds that
    the worker stays without work; None means the default, a negative number for ever. ``alias`` and
    ``sources``: what ``model`` stands for; given, nobody's config.toml is asked.
    """

    model: str
    engine: str = ""
    backend: str | None = None
    device: str | None = None
    owner: str = ""
    node: str | None = None
    task: str = "generate"
    max_model_len: int | None = None
    dtype: str | None = None
    kv_cache_bytes: int | None = None
    max_num_seqs: int | None = None
    engine_args: dict[str, str] = attrs.field(factory=dict)
    keep_alive: float | None = None
    alias: str = ""
    sources: tuple[str, ...] = ()
    hub: HubAccess = attrs.field(factory=HubAccess)


@attrs.frozen
class NodeChoice:
    """One node as `POST` of a `StartWorker` to a queen's ``workers/explain`` ranks it.

    Attributes:
        suits: ``warm``, ``coming`` (it loads), ``on_disk``, ``room``, ``full_on_disk``, ``full``,
            ``doubted`` (tried last) or ``no``.
        why: for people.
    """

    node: str
    suits: str
    why: str


@attrs.frozen
class WorkerInfo:
    """One worker as its hive sees it.

    Attributes:
        state: a `rbee.model.WorkerState` value.
        progress, share: what the loading is at, and how much of that is done (0 … 1), if known.
        task: ``generate`` or ``embed``.
        max_model_len, dtype, kv_cache_bytes, max_num_seqs, engine_args: as they were asked for.
        keep_alive: seconds that it stays without work; negative: for ever.
        running: requests that it is at, as last seen.
        idle: seconds since its last request ended, as last seen; 0 while one runs.
        slots: requests that its engine works on at once; 0 if that is not known.
    """

    worker_id: str
    model: str
    state: str
    url: str = ""
    served_names: tuple[str, ...] = ()
    engine: str = "vllm"
    backend: str = "cpu"
    device: str = "0"
    owner: str = ""
    node: str = "localhost"
    pid: int = 0
    progress: str = ""
    share: float | None = None
    task: str = "generate"
    max_model_len: int | None = None
    dtype: str | None = None
    kv_cache_bytes: int | None = None
    max_num_seqs: int | None = None
    engine_args: dict[str, str] = attrs.field(factory=dict)
    keep_alive: float = KEEP_ALIVE
    running: int = 0
    idle: float = 0.0
    slots: int = 0
    error: ErrorDetail | None = None


@attrs.frozen
class WorkerIds:
    """The first event of a hive's news: all its workers; one that is not in it has ended."""

    worker_ids: tuple[str, ...]


@attrs.frozen
class Heartbeat:
    """A hive lives; among its news every 5 s, with its workers as they are (`WorkerInfo`).

    Attributes:
        models: every name of each model on its disk; None until it has looked.
        devices: what workers can run on there; empty until it has looked.
    """

    hive_id: str
    memory_total: int
    memory_free: int
    disk_free: int
    workers: tuple[WorkerInfo, ...] = ()
    models: tuple[str, ...] | None = None
    devices: tuple[Device, ...] = ()


@attrs.frozen
class WorkerNarration:
    """What is being done for a worker that is not ready yet, for people who wait for it.

    Also the body of a worker's own ``POST /v1/workers/progress`` to its hive.
    ``share``: how much of it is done, 0 … 1; None where nobody knows.
    """

    worker_id: str
    actor: str
    action: str
    text: str
    share: float | None = None


@attrs.frozen
class OwnerLease:
    """``PUT /v1/owners/{queen_id}`` on an operator's hive: a queen lives, and where it is.

    Renewed every 2 s; after ``lease`` seconds without, the hive stops that queen's workers.
    """

    url: str
    token: str
    lease: float = 10.0


@attrs.frozen
class Device:
    """One device that a worker can run on; memory in bytes."""

    backend: str
    index: int
    name: str
    memory_total: int
    memory_free: int


@attrs.frozen
class WorkerReady:
    """The ready callback, worker → hive → queen. ``slots`` and ``pid``: as in `WorkerInfo`."""

    worker_id: str
    url: str
    model_ref: str
    backend: str
    device: str
    slots: int = 0
    pid: int = 0


@attrs.frozen
class ReadyState:
    """``GET /v1/ready`` of a worker: 200 with ``ready``, else 503 with what it is doing.

    Attributes:
        share: how much of ``progress`` is done, 0 … 1; None where nobody knows.
        running: requests that it is at.
        idle: seconds since the last one ended (or since it is ready); 0 while one runs.
        keep_alive: seconds without work after which it is to go; negative: for ever.
        is_fresh: whether nobody has used it yet.
    """

    worker_id: str
    state: str
    progress: str = ""
    share: float | None = None
    running: int = 0
    idle: float = 0.0
    keep_alive: float = KEEP_ALIVE
    is_fresh: bool = False


@attrs.frozen
class StopWorker:
    """The body, if any, of a worker's ``POST /v1/admin/shutdown``.

    ``if_idle``: refuse with 409 ``worker_busy`` while a request runs.
    """

    if_idle: bool = False


# models ---------------------------------------------------------------------------------------
@attrs.frozen
class ModelInfo:
    """One model on a node's disk; ``GET`` of a hive's or a queen's models lists them.

    Attributes:
        model: canonical reference, such as ``hf:org/repo``.
        name: its record on disk; `DELETE` takes it as well as ``model``.
        version: revision of the repository or version of the package; "" where there is none.
        size: bytes on disk.
        context: longest sequence in tokens; 0 when unknown.
        last_used, created: seconds since the epoch.
        in_use: whether a worker on that node, of any hive, has it loaded.
        damage: why it cannot be used; "" if it can. ``model pull`` repairs it.
        references: every canonical reference that its files stand for, ``model`` among them.
    """

    model: str
    name: str
    node: str
    directory: str
    source: str = ""
    version: str = ""
    size: int = 0
    dtype: str = ""
    architecture: str = ""
    parameters: int = 0
    context: int = 0
    chat_template: bool = False
    created: float = 0.0
    last_used: float = 0.0
    in_use: bool = False
    files: tuple[str, ...] = ()
    damage: str = ""
    references: tuple[str, ...] = ()


@attrs.frozen
class PullModel:
    """``POST`` to a hive's or a queen's models: narration events, then `Pulled` or an error.

    ``alias``, ``sources``: as in `StartWorker`.
    """

    model: str
    node: str | None = None
    dtype: str | None = None
    alias: str = ""
    sources: tuple[str, ...] = ()
    hub: HubAccess = attrs.field(factory=HubAccess)


@attrs.frozen
class Pulled:
    """The last event of a pull."""

    model: str
    directory: str


# jobs -----------------------------------------------------------------------------------------
@attrs.frozen
class Message:
    """One turn of a chat; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@attrs.frozen
class ExecuteRequest:
    """``POST /execute``. Exactly one of ``prompt`` and ``messages``; ``raw`` skips the template.

    ``keep_alive``: seconds that the worker stays after this request; None leaves it as it is.
    ``priority``: for an engine that schedules by it, as vLLM does if it is told to.
    """

    job_id: str
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    raw: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    keep_alive: float | None = None
    priority: int = 0


@attrs.frozen
class TaskRequest:
    """``POST /v2/tasks``: an `ExecuteRequest` less its id, plus the model and the placement.

    ``max_model_len`` … ``engine_args`` are what a worker is started with if none fits; one that
    runs fits if it was started with what is given here. ``keep_alive`` sets how long the worker
    stays after this request (seconds; negative: for ever).

    ``priority``: as vLLM has it, a lower one is served earlier, 0 is usual; requests of the same
    are served in the order in which they came. ``deadline``: seconds from when it is accepted.
    """

    model: str
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    raw: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    node: str | None = None
    backend: str | None = None
    device: str | None = None
    engine: str | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    kv_cache_bytes: int | None = None
    max_num_seqs: int | None = None
    engine_args: dict[str, str] = attrs.field(factory=dict)
    keep_alive: float | None = None
    priority: int = 0
    deadline: float | None = None
    hub: HubAccess = attrs.field(factory=HubAccess)


@attrs.frozen
class TaskAccepted:
    """The answer, 202, to a `TaskRequest` that was sent with ``Prefer: respond-async``.

    ``events_url`` is relative to the queen.
    """

    job_id: str
    events_url: str


@attrs.frozen
class TaskInfo:
    """One job; ``GET /v2/tasks/{job_id}``, and ``GET /v2/tasks`` lists all that are known.

    Attributes:
        state: a `rbee.model.JobState` value.
        attached: whether it belongs to the connection that asked for it, and its events too.
        worker_id, node: who is at it; "" as long as nobody is.
        position: how many are before it; 0 once a worker is at it.
        created, started, ended: seconds since the epoch; 0 is not yet.
        tokens_in, tokens_out: None where the queen does not know, as of an attached job.
        first_event, last_event: what can be read of its events; 0 is none.
    """

    job_id: str
    state: str
    model: str
    attached: bool = False
    priority: int = 0
    deadline: float | None = None
    worker_id: str = ""
    node: str = ""
    position: int = 0
    created: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    tokens_in: int | None = None
    tokens_out: int | None = None
    stop_reason: str = ""
    first_event: int = 0
    last_event: int = 0
    error: ErrorDetail | None = None


# events of a job; the class name in lower case is the SSE event's name -------------------------
@attrs.frozen
class Queued:
    """``position``: how many jobs are before this one."""

    job_id: str
    position: int


@attrs.frozen
class Narration:
    """``share``: how much of the action is done, 0 … 1; None where nobody knows."""

    actor: str
    action: str
    text: str
    share: float | None = None


@attrs.frozen
class Started:
    """A worker is at it: its prompt is about to be read."""

    job_id: str
    worker_id: str
    node: str
    model: str


@attrs.frozen
class Token:
    """``t`` is text; ``i`` the number of tokens generated so far, this text's included."""

    t: str
    i: int


@attrs.frozen
class End:
    """The answer is whole.

    Attributes:
        stop_reason: ``stop``, or ``length`` if it was cut at its greatest length.
        ttft_ms: milliseconds at the worker until the first token.
        duration_ms: milliseconds at the worker until the last one.
    """

    tokens_in: int
    tokens_out: int
    stop_reason: str
    ttft_ms: float
    duration_ms: float


@attrs.frozen
class Error:
    """``details``: what a program may want of the error, such as the bytes of a 507."""

    code: str
    message: str
    hint: str = ""
    details: dict[str, Any] = attrs.field(factory=dict)


Event = Queued | Narration | Started | Token | End | Error
EVENTS: dict[str, type[Any]] = {
    cls.__name__.lower(): cls for cls in (Queued, Narration, Started, Token, End, Error)
}
TERMINAL = ("end", "error")


@attrs.frozen
class ErrorDetail:
    code: str
    message: str
    hint: str = ""
    details: dict[str, Any] = attrs.field(factory=dict)
    correlation_id: str = ""


@attrs.frozen
class ErrorBody:
    """The body of every refusal outside the OpenAI routes."""

    error: ErrorDetail
