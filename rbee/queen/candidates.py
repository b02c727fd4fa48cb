"""Which node is to run a model: a pure choice over what is known of all nodes, with the reasons.

Memory alone refuses a node only if the model could never fit there: a hive makes room by unloading
idle workers and waits for busy ones, and what it has free is known a few seconds late. A node that
is full now just comes last.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence

import attrs

from rbee.errors import InsufficientError, NotFoundError, RbeeError, UnavailableError
from rbee.model import DEFAULT_ENGINE, LOCALHOST, WorkerState
from rbee.queen.placement import Meanings, fits, itself
from rbee.wire.messages import Device, NodeChoice, StartWorker, TaskRequest, WorkerInfo

READY = "ready"


@attrs.frozen
class NodeView:
    """What is known of one node when a choice is made.

    Attributes:
        state: ``ready``; in any other nothing is placed there.
        reason: why it is not ready, for people.
        doubt: why it is only tried after all others, for people; "" if it is not.
        workers: those of its workers that may be used.
        models: every name of each model on its disk.
        memory_total, memory_free: for workers on its CPU, in bytes; None where nobody knows.
        devices: what workers can run on there; empty where nobody knows.
        engines: those installed there; None where nobody knows.
    """

    name: str
    state: str = READY
    reason: str = ""
    doubt: str = ""
    workers: tuple[WorkerInfo, ...] = ()
    models: frozenset[str] = frozenset()
    memory_total: int | None = None
    memory_free: int | None = None
    devices: tuple[Device, ...] = ()
    engines: frozenset[str] | None = None

    @property
    def load(self) -> int:
        """How many requests run there."""
        return sum(worker.running for worker in self.workers)


class Rank(enum.IntEnum):
    """How well a node suits, best first."""

    WARM = 0  # a worker is ready
    COMING = 1  # a worker is on its way
    ON_DISK = 2  # as far as is known there is room as well
    ROOM = 3
    FULL_ON_DISK = 4
    FULL = 5
    DOUBTED = 6


@attrs.frozen
class Candidate:
    """A node that can run it, and why it comes where it comes."""

    node: str
    rank: Rank
    why: str


@attrs.frozen
class Rejected:
    """A node that cannot run it; ``error`` is what asking for it by name would raise."""

    node: str
    why: str
    error: type[RbeeError] = UnavailableError


@attrs.frozen
class Ranking:
    """All nodes: those that can run it, the best first, and by name those that cannot."""

    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]

    def explain(self) -> list[NodeChoice]:
        """Tell of each node, in this order."""
        told = [NodeChoice(one.node, one.rank.name.lower(), one.why) for one in self.candidates]
        return told + [NodeChoice(one.node, "no", one.why) for one in self.rejected]


def rank(
    request: TaskRequest | StartWorker,
    nodes: Iterable[NodeView],
    *,
    needed: int | None = None,
    meanings: Meanings = itself,
) -> Ranking:
    """Put the nodes in the order in which they are to be tried.

    Of equals the queen's own machine comes first, then the least busy one.

    Args:
        needed: bytes that a new worker takes; None where nobody knows.
    """
    by_name = sorted(nodes, key=lambda node: node.name)
    judged = [(node, _judge(node, request, needed, meanings)) for node in by_name]
    found = [(node, one) for node, one in judged if isinstance(one, Candidate)]
    found.sort(key=lambda pair: (pair[1].rank, pair[0].name != LOCALHOST, pair[0].load))
    return Ranking(
        tuple(one for _, one in found),
        tuple(one for _, one in judged if isinstance(one, Rejected)),
    )


def none_of(asked: str | None, rejected: Sequence[Rejected]) -> RbeeError:
    """Make the error of a request that no node can run; it tells why each one cannot."""
    known = [one.node for one in rejected]
    if asked is not None and asked not in known:
        return NotFoundError(
            f"no node {asked!r}; known: {', '.join(known) or 'none'}",
            code="unknown_node",
            hint="rbee-keeper node list",
        )
    why = {one.node: one.why for one in rejected}
    for one in rejected:
        if one.node == asked:
            return one.error(
                f"node {asked} cannot run it: {one.why}",
                code=_CODES[one.error],
                hint=f"rbee-keeper node check {asked}",
                why=why,
            )
    reasons = "; ".join(f"{node}: {text}" for node, text in why.items())
    kinds = {one.error for one in rejected}
    kind = kinds.pop() if len(kinds) == 1 else UnavailableError
    return kind(
        f"no node can run it: {reasons or 'there are none'}",
        code=_CODES[kind],
        hint="rbee-keeper node list",
        why=why,
    )


_CODES: Mapping[type[RbeeError], str] = {
    UnavailableError: "node_not_usable",
    InsufficientError: "insufficient_memory",
}


def _judge(
    node: NodeView, request: TaskRequest | StartWorker, needed: int | None, meanings: Meanings
) -> Candidate | Rejected:
    if request.node is not None and node.name != request.node:
        return Rejected(node.name, f"node {request.node} was asked for")
    if node.state != READY:
        return Rejected(node.name, node.state + (f": {node.reason}" if node.reason else ""))
    if missing := _missing_engine(node, request) or _missing_device(node, request):
        return Rejected(node.name, missing)
    if _is_elsewhere(node, request, meanings):
        return Rejected(node.name, f"a path is one of {LOCALHOST}, unless a node is named")
    warm = _warm(node, request, meanings)
    found = Candidate(node.name, *warm) if warm else _judge_room(node, request, needed, meanings)
    if node.doubt and isinstance(found, Candidate):
        return Candidate(node.name, Rank.DOUBTED, f"tried after all others: {node.doubt}")
    return found


def _missing_engine(node: NodeView, request: TaskRequest | StartWorker) -> str:
    engine = request.engine or DEFAULT_ENGINE
    if node.engines is None or engine in node.engines:
        return ""
    return f"no engine {engine} (it has {', '.join(sorted(node.engines)) or 'none'})"


def _missing_device(node: NodeView, request: TaskRequest | StartWorker) -> str:
    """Say which GPU that is asked for the node has not got; "" if it has all."""
    if _backend(request) == "cpu" or not node.devices:
        return ""
    there = {str(one.index) for one in node.devices if one.backend == _backend(request)}
    missing = [index for index in _indices(request) if index not in there]
    if not missing:
        return ""
    has = f"it has {', '.join(sorted(there))}" if there else "it has none"
    return f"no {_backend(request)} device {', '.join(missing)} ({has})"


def _warm(
    node: NodeView, request: TaskRequest | StartWorker, meanings: Meanings
) -> tuple[Rank, str] | None:
    fitting = [one for one in node.workers if fits(one, request, meanings)]
    ready = [one for one in fitting if one.state == WorkerState.READY.value]
    if ready:
        one = min(ready, key=lambda one: (one.running, one.worker_id))
        return Rank.WARM, f"{one.worker_id} has the model loaded"
    if fitting:
        one = min(fitting, key=lambda one: one.worker_id)
        return Rank.COMING, f"{one.worker_id} is loading the model"
    return None


def _is_on_disk(node: NodeView, request: TaskRequest | StartWorker, meanings: Meanings) -> bool:
    names = meanings(request.model)
    is_here = node.name == LOCALHOST and any(map(_is_path, names))
    return is_here or not node.models.isdisjoint(names)


def _is_elsewhere(node: NodeView, request: TaskRequest | StartWorker, meanings: Meanings) -> bool:
    """Tell whether a model is nothing but a path that was meant on another machine."""
    if request.node is not None or node.name == LOCALHOST:
        return False
    names = meanings(request.model)
    return any(map(_is_path, names)) and not any(map(_is_fetched, names))


def _is_path(name: str) -> bool:
    return name.startswith(("/", "file:"))


def _is_fetched(name: str) -> bool:
    return name.startswith(("hf:", "pypi:"))


def _judge_room(
    node: NodeView, request: TaskRequest | StartWorker, needed: int | None, meanings: Meanings
) -> Candidate | Rejected:
    total, free = _memory(node, request)
    is_on_disk = _is_on_disk(node, request, meanings)
    disk = "the model is on its disk" if is_on_disk else "the model is not on its disk"
    if needed is None or free is None:
        return Candidate(
            node.name, Rank.ON_DISK if is_on_disk else Rank.ROOM, f"{disk}; memory not compared"
        )
    if total is not None and needed > total:
        why = f"needs {_gib(needed)} of memory, has {_gib(total)} in all"
        return Rejected(node.name, why, InsufficientError)
    said = f"{disk}; needs {_gib(needed)} of memory, {_gib(free)} free"
    if needed <= free:
        return Candidate(node.name, Rank.ON_DISK if is_on_disk else Rank.ROOM, said)
    return Candidate(node.name, Rank.FULL_ON_DISK if is_on_disk else Rank.FULL, said)


def _memory(node: NodeView, request: TaskRequest | StartWorker) -> tuple[int | None, int | None]:
    """Return the total and free bytes of what would be used; None where nobody knows."""
    if _backend(request) == "cpu":
        return node.memory_total, node.memory_free
    used = [one for one in node.devices if _is_used(one, request)]
    if not used:
        return None, None
    return sum(one.memory_total for one in used), sum(one.memory_free for one in used)


def _is_used(device: Device, request: TaskRequest | StartWorker) -> bool:
    return device.backend == _backend(request) and str(device.index) in _indices(request)


def _backend(request: TaskRequest | StartWorker) -> str:
    return request.backend or "cpu"


def _indices(request: TaskRequest | StartWorker) -> Collection[str]:
    return [index.strip() for index in (request.device or "0").split(",")]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
