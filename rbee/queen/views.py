"""What is known of each node when a choice is made: its hive's news, the registry, this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import attrs
import trio

from rbee.devices import devices, memory
from rbee.errors import BadInputError, RbeeError
from rbee.home import Home
from rbee.model import LOCALHOST
from rbee.models.names import CatalogNames
from rbee.nodes.node import Node, NodeStatus
from rbee.queen.attempts import Attempts
from rbee.queen.candidates import READY, NodeView
from rbee.queen.hives import Hives
from rbee.wire import codec
from rbee.wire.messages import Device, Heartbeat, WorkerInfo

log = logging.getLogger(__name__)

AVOIDED = 30.0  # seconds for which a node that has failed is not tried unless it is asked for
LOOK = 2.0  # seconds for our own disk to answer
_HIVES = {"unresponsive": "its hive does not answer", "stopping": "its hive is being stopped"}


class Registry(Protocol):
    """The registered nodes (`rbee.nodes.store.NodeStore`)."""

    async def all(self) -> list[Node]: ...


@attrs.frozen
class Known:
    """What this queen itself has seen of a node.

    Attributes:
        hive: the state of its hive; "" if none runs.
        beat: the last heartbeat of its hive, or of the one before.
        silent: seconds for which an attempt to reach it tells nothing, if that is long; None if
            none runs.
        fenced: seconds in which something of a lost hive may still run there.
        failed: seconds since it could not be reached, and ``why``; None if it could.
    """

    hive: str = ""
    beat: Heartbeat | None = None
    workers: tuple[WorkerInfo, ...] = ()
    silent: float | None = None
    fenced: float = 0.0
    failed: float | None = None
    why: str = ""


@attrs.frozen
class Own:
    """What this machine has."""

    models: frozenset[str] = frozenset()
    memory_total: int | None = None
    memory_free: int | None = None
    devices: tuple[Device, ...] = ()


@attrs.frozen
class Standing:
    """Whether a node can be used: fields of `NodeView`."""

    state: str = READY
    reason: str = ""
    doubt: str = ""


class Views:
    """The view of a queen on all nodes."""

    def __init__(
        self,
        home: Home,
        hives: Hives,
        attempts: Attempts,
        registry: Registry,
        fenced_for: Callable[[str], float],
    ) -> None:
        self._names = CatalogNames(home.models)
        self._hives = hives
        self._attempts = attempts
        self._registry = registry
        self._fenced_for = fenced_for
        self._looking = trio.CapacityLimiter(1)  # a home on a dead NFS holds one thread, not all

    async def look(self) -> list[NodeView]:
        """Return what is known of this machine and of every registered node."""
        own = own_view(await self._look_here(), self._known(LOCALHOST))
        return [own, *(node_view(node, self._known_of(node)) for node in await self._nodes())]

    async def _nodes(self) -> list[Node]:
        try:
            return await self._registry.all()
        except RbeeError as exc:  # this machine can be used without it
            log.warning("registered nodes are not used: %s", exc)
            return []

    async def _look_here(self) -> Own:
        with trio.move_on_after(LOOK):
            return await trio.to_thread.run_sync(
                _look, self._names, abandon_on_cancel=True, limiter=self._looking
            )
        log.warning("this machine's disk does not answer")
        return Own()

    def _known_of(self, node: Node) -> Known:
        """Forget a failure from before the node was last seen well: somebody has checked it."""
        known, failure = self._known(node.name), self._attempts.failure(node.name)
        if failure is not None and node.last_seen > failure.noted:
            return attrs.evolve(known, failed=None, why="")
        return known

    def _known(self, name: str) -> Known:
        hive, failure = self._hives.running(name), self._attempts.failure(name)
        was_heard = hive is None or failure is None or hive.heard > failure.at
        return Known(
            hive="" if hive is None else hive.info.state if was_heard else "unresponsive",
            beat=self._hives.beats.get(name),
            workers=tuple(info for info in self._hives.workers if info.node == name),
            silent=self._attempts.silent(name),
            fenced=self._fenced_for(name),
            failed=None if failure is None else trio.current_time() - failure.at,
            why="" if failure is None else str(failure.error),
        )


def _look(names: CatalogNames) -> Own:
    return Own(frozenset(names.read()), *memory(), tuple(devices()))


def own_view(own: Own, known: Known) -> NodeView:
    """Return the view on this machine, which needs no hive to tell what it has."""
    stands = standing(known)
    if known.failed is not None and stands.state != READY:  # nobody is far away: try again at once
        stands = Standing(doubt=known.why)
    return NodeView(
        LOCALHOST, stands.state, stands.reason, stands.doubt, known.workers, own.models,
        own.memory_total, own.memory_free, own.devices,
    )  # fmt: skip


def node_view(node: Node, known: Known) -> NodeView:
    """Return the view on a registered node: its hive's last news, else what it has once said."""
    is_well = node.status in (NodeStatus.READY, NodeStatus.UNKNOWN)
    stands = standing(known, "" if is_well else node.last_error or node.status.value)
    models, there = _told(node, known.beat)
    cpu = next((one for one in there if one.backend == "cpu"), None)
    total, free = (cpu.memory_total, cpu.memory_free) if cpu else (None, None)
    if known.beat is not None:
        total, free = known.beat.memory_total, known.beat.memory_free
    return NodeView(
        node.name, stands.state, stands.reason, stands.doubt, known.workers, models, total, free,
        there, _engines(node.capabilities),
    )  # fmt: skip


def standing(known: Known, trouble: str = "") -> Standing:
    """Say whether a node can be used; ``trouble`` is what the registry has against it.

    A running hive, or an attempt that goes on, tells more than what was before.
    """
    if known.hive:
        return Standing(doubt=_HIVES.get(known.hive, ""))
    if known.silent is not None:
        return Standing(doubt=f"no answer for {known.silent:.0f} s" if known.silent else "")
    if known.fenced > 0:
        reason = f"for {known.fenced:.0f} s something of its lost hive may still run there"
        return Standing("fenced", reason)
    if known.failed is not None and known.failed < AVOIDED:
        return Standing(f"failed {known.failed:.0f} s ago", known.why)
    return Standing(doubt=known.why or trouble)


def _told(node: Node, beat: Heartbeat | None) -> tuple[frozenset[str], tuple[Device, ...]]:
    """Return the models on a node's disk, and its devices."""
    models = beat.models if beat else None
    there = beat.devices if beat else ()
    return (
        frozenset(_texts(node.capabilities, "models") if models is None else models),
        there or _devices(node.capabilities),
    )


def _devices(capabilities: Mapping[str, Any]) -> tuple[Device, ...]:
    try:
        return codec.structure(capabilities.get("devices", []), tuple[Device, ...])
    except BadInputError:  # of another version
        return ()


def _engines(capabilities: Mapping[str, Any]) -> frozenset[str] | None:
    found = capabilities.get("engines")
    if not isinstance(found, Mapping):
        return None
    return frozenset(str(name) for name, version in found.items() if version)


def _texts(capabilities: Mapping[str, Any], key: str) -> list[str]:
    found = capabilities.get(key)
    return [str(text) for text in found] if isinstance(found, list) else []
