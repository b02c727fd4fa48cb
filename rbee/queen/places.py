"""Where a worker is started: there where it is asked for, or on the node that suits it best."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import attrs
import trio

from rbee.errors import PeerError, RbeeError, UnavailableError
from rbee.queen.attempts import Attempts, Narrate
from rbee.queen.candidates import NodeView, Ranking, Rejected, none_of, rank
from rbee.queen.hive import Hive
from rbee.queen.needs import Needed
from rbee.queen.placement import Meanings, itself
from rbee.wire.messages import Narration, NodeChoice, StartWorker, WorkerInfo

Look = Callable[[], Awaitable[list[NodeView]]]
"""Tell what is known of all nodes (`rbee.queen.views.Views.look`)."""
Begin = Callable[[Hive], Awaitable[WorkerInfo]]
"""Have a hive start a worker."""

BROKEN = frozenset({"unreachable", PeerError.code})  # nobody is there, or not any more


class Places:
    """Finds the node for a new worker, and has it started there."""

    def __init__(
        self, look: Look, attempts: Attempts, needed: Needed, meanings: Meanings = itself
    ) -> None:
        self._look = look
        self._attempts = attempts
        self._needed = needed
        self._meanings = meanings

    async def start(
        self,
        request: StartWorker,
        narrate: Narrate,
        begin: Begin,
        *,
        since: float = float("inf"),
    ) -> WorkerInfo:
        """Begin a worker on the node that is asked for, else on the best one that is reached.

        Args:
            since: when it was asked for; an attempt that failed after that counts for it as well.

        Raises:
            NotFoundError: there is no such node.
            UnavailableError, InsufficientError: no node can run it; ``why`` tells it of each.
            RbeeError: why the one node in question cannot, or what ``begin`` raises.
        """
        if request.node is not None:
            hive = await self._attempts.get(request.node, narrate, since=since)
            return await self._begin(hive, narrate, begin)
        views = await self._look()
        if len(views) == 1:  # nothing to choose: its hive says best what is wrong
            name = views[0].name
            hive = await self._attempts.get(name, narrate, since=since)
            return await self._begin(hive, narrate, begin)
        needed = await self._needed(request)
        ranking = self._rank(request, views, needed)
        self._try_doubted(self._rank(request, _undoubted(views), needed), ranking)
        return await self._start_on_best(ranking, narrate, begin)

    async def explain(self, request: StartWorker) -> list[NodeChoice]:
        """Tell where a worker would be started, and why, without starting anything.

        Raises:
            NotFoundError: there is no such node.
        """
        views = await self._look()
        ranking = self._rank(request, views, await self._needed(request))
        if request.node not in (None, *(view.name for view in views)):
            raise none_of(request.node, ranking.rejected)
        return ranking.explain()

    def _rank(self, request: StartWorker, views: Sequence[NodeView], needed: int | None) -> Ranking:
        return rank(request, views, needed=needed, meanings=self._meanings)

    def _try_doubted(self, wished: Ranking, ranking: Ranking) -> None:
        """Look whether the node that were best is well again; this request does not wait for it."""
        if wished.candidates and wished.candidates[0].node != ranking.candidates[0].node:
            self._attempts.begin(wished.candidates[0].node)

    async def _start_on_best(self, ranking: Ranking, narrate: Narrate, begin: Begin) -> WorkerInfo:
        began = trio.current_time()
        left = [one.node for one in ranking.candidates]
        while left and (hive := await self._attempts.first(left, narrate)):
            try:
                return await self._begin(hive, narrate, begin)
            except UnavailableError as exc:  # it went just now
                narrate(Narration("queen", "skip", f"{hive.info.node}: {exc}"))
                self._attempts.note_failure(hive.info.node, exc)
            left = [node for node in left if not self._failure_since(began, node)]
        raise self._none(ranking, began)

    async def _begin(self, hive: Hive, narrate: Narrate, begin: Begin) -> WorkerInfo:
        """Begin a worker there; a hive of which nobody has told yet that it ended is replaced."""
        try:
            return await begin(hive)
        except (UnavailableError, PeerError) as exc:
            if exc.code not in BROKEN or not await hive.ends():
                raise
        return await begin(await self._attempts.get(hive.info.node, narrate))

    def _failure_since(self, began: float, node: str) -> str:
        failure = self._attempts.failure(node)
        return str(failure.error) if failure and failure.at >= began else ""

    def _none(self, ranking: Ranking, began: float) -> RbeeError:
        """Make the error of a start that no node takes, with the reason of each."""
        tried = [
            Rejected(one.node, self._failure_since(began, one.node) or one.why)
            for one in ranking.candidates
        ]
        return none_of(None, (*tried, *ranking.rejected))


def _undoubted(views: Sequence[NodeView]) -> list[NodeView]:
    return [attrs.evolve(view, doubt="") for view in views]
