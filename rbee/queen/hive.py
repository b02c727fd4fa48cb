"""A hive that answers, as its queen sees and calls it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from types import TracebackType

import attrs
import httpx
import trio

from rbee.web.client import call
from rbee.wire import messages
from rbee.wire.messages import Heartbeat, HiveInfo, StartWorker, WorkerInfo

log = logging.getLogger(__name__)

STOP = 20.0  # seconds for a worker to be stopped
ENDS = 8.0  # seconds in which its guards end what is below it, and tell of it
SILENT = 11.0  # seconds without a heartbeat, which come every 5: it does not answer


async def _as_it_is(url: str) -> str:
    return url


@attrs.define(eq=False)
class Hive:
    """A hive that answers; usable until `gone`.

    Attributes:
        via: returns our address for one that its node has told as its own.
    """

    info: HiveInfo
    owned: bool
    token: str = attrs.field(repr=False)
    client: httpx.AsyncClient
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    via: Callable[[str], Awaitable[str]] = _as_it_is
    starting: trio.Lock = attrs.field(factory=trio.Lock)
    gone: trio.Event = attrs.field(factory=trio.Event)
    heard: float = attrs.field(factory=trio.current_time)
    _ways: dict[str, str] = attrs.field(factory=dict)
    _relays: set[trio.CancelScope] = attrs.field(factory=set)

    @property
    def name(self) -> str:
        return f"hive on {self.info.node}"

    async def start_worker(self, request: StartWorker) -> WorkerInfo:
        request = attrs.evolve(request, node=self.info.node)
        info = await call(
            self.client, "POST", messages.HIVE_WORKERS, WorkerInfo, request, what=self.name
        )
        return self.at_node(info)

    def at_node(self, info: WorkerInfo) -> WorkerInfo:
        """Return a worker of its at the node as our queen calls it, which its hive may not know."""
        return attrs.evolve(info, node=self.info.node)

    async def stop_worker(self, worker_id: str) -> None:
        path = f"{messages.HIVE_WORKERS}/{worker_id}"
        await call(self.client, "DELETE", path, type(None), what=self.name, limit=STOP)

    # where its workers are -------------------------------------------------------------------
    async def learn(self, url: str) -> None:
        """Find our way to a worker's address; `way_to` knows it then."""
        if url and url not in self._ways:
            self._ways[url] = await self.via(url)

    def way_to(self, url: str) -> str:
        return self._ways.get(url, url)

    def relaying(self) -> Relaying:
        """Run a relay from one of its workers; it is cancelled when the hive is lost."""
        return Relaying(self._relays)

    def note_gone(self) -> None:
        """Note that it is lost: a worker of a silent node would never end its answer."""
        self.gone.set()
        for scope in self._relays:
            scope.cancel(reason=f"{self.name} is gone")

    async def ends(self) -> bool:
        """Tell whether it is gone; one that does not answer is given the time to be known to be."""
        with trio.move_on_after(ENDS):
            await self.gone.wait()
        return self.gone.is_set()

    # how it stands ---------------------------------------------------------------------------
    def note_beat(self, beat: Heartbeat) -> None:
        self.info = attrs.evolve(
            self.info, workers=len(beat.workers), memory_total=beat.memory_total,
            memory_free=beat.memory_free, disk_free=beat.disk_free,
        )  # fmt: skip

    def note_answering(self, answers: bool) -> None:
        state = "ready" if answers else "unresponsive"
        if self.info.state not in (state, "stopping"):
            log.warning("%s %s", self.name, "answers again" if answers else "does not answer")
            self.info = attrs.evolve(self.info, state=state)

    async def keep_watching(self) -> None:
        """See when it falls silent, though its connections stand: a frozen process keeps them."""
        while True:
            self.note_answering(trio.current_time() - self.heard < SILENT)
            await trio.sleep(1)

    def told(self) -> HiveInfo:
        return attrs.evolve(self.info, last_seen=round(trio.current_time() - self.heard, 3))


class Relaying:
    """A scope that is among others while its body runs."""

    __slots__ = ("_others", "_scope")

    def __init__(self, others: set[trio.CancelScope]) -> None:
        self._others = others
        self._scope = trio.CancelScope()

    def __enter__(self) -> trio.CancelScope:
        self._others.add(self._scope)
        return self._scope.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> bool:
        self._others.discard(self._scope)
        return self._scope.__exit__(kind, error, where)
