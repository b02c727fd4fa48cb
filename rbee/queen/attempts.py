"""Attempts to reach nodes' hives: one at a time for each node, and what came of the last one.

An attempt goes on when nobody waits for it any more: a node that is slow is ready for the next who
wants it, and one that is dead is known to be, so that it costs time only once.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import attrs
import trio

from rbee.errors import RbeeError, UnavailableError
from rbee.queen.hive import Hive
from rbee.scopes import TaskOwner
from rbee.wire.messages import Narration

# seconds without news of an attempt until the next node is tried as well: to reach it, to start
PATIENCE, START = 5.0, 30.0
ON_THE_WAY = ("connect", "wait")  # what is told before a node is reached

Narrate = Callable[[Narration], None]
Get = Callable[[str, Narrate], Awaitable[Hive]]
"""Find or start a node's hive (`rbee.queen.hives.Hives.get`)."""


@attrs.frozen
class Failure:
    """Why a node was not reached: ``at`` in trio's time, ``noted`` in seconds since the epoch."""

    error: RbeeError
    at: float
    noted: float


@attrs.define(eq=False)
class Attempt:
    """One attempt; ``heard`` is when it last told that it goes on."""

    heard: float = attrs.field(factory=trio.current_time)
    is_reached: bool = False
    hive: Hive | None = None
    error: RbeeError | None = None
    over: trio.Event = attrs.field(factory=trio.Event)
    _listeners: list[Narrate] = attrs.field(factory=list)

    def tell(self, narration: Narration) -> None:
        self.heard = trio.current_time()
        self.is_reached = narration.action not in ON_THE_WAY  # not any more, if it was lost again
        for narrate in self._listeners:
            narrate(narration)

    @contextmanager
    def heard_by(self, narrate: Narrate) -> Iterator[None]:
        """Tell ``narrate`` what goes on while the body runs."""
        self._listeners.append(narrate)
        try:
            yield
        finally:
            self._listeners.remove(narrate)

    @property
    def silent(self) -> float:
        """Seconds since it last told something."""
        return trio.current_time() - self.heard

    @property
    def left(self) -> float:
        """Seconds for which it may still tell nothing before others need not wait for it."""
        return (START if self.is_reached else PATIENCE) - self.silent


class Attempts(TaskOwner):
    """The attempts of one queen; their tasks live in the nursery that `open` holds."""

    def __init__(self, get: Get) -> None:
        self._get = get
        self._running: dict[str, Attempt] = {}
        self._failures: dict[str, Failure] = {}
        self._ended = trio.Event()

    def silent(self, node: str) -> float | None:
        """Return for how long the attempt at a node tells nothing, None if none runs.

        0.0 as long as that is nothing to worry about.
        """
        attempt = self._running.get(node)
        if attempt is None:
            return None
        return attempt.silent if attempt.left <= 0 else 0.0

    def failure(self, node: str) -> Failure | None:
        """Return why the last attempt at a node failed; None if it did not."""
        return self._failures.get(node)

    def note_failure(self, node: str, error: RbeeError) -> None:
        self._failures[node] = Failure(error, trio.current_time(), time.time())

    def begin(self, node: str) -> Attempt:
        """Return the attempt that runs at a node, begun if there is none."""
        if not self.takes_tasks:
            raise _stopping()
        if node not in self._running:
            self._running[node] = Attempt()
            self.tasks.start_soon(self._keep, node, self._running[node])
        return self._running[node]

    async def get(self, node: str, narrate: Narrate, *, since: float = float("inf")) -> Hive:
        """Return a node's hive, found or started.

        Args:
            since: an attempt that failed after this is not made again: many that wait for one
                dead node in turn would wait ever longer.

        Raises:
            NotFoundError: there is no such node.
            RbeeError: it is not reached, or its hive cannot be started.
        """
        failure = self._failures.get(node)
        if failure is not None and failure.at >= since:
            raise failure.error
        attempt = self.begin(node)
        with attempt.heard_by(narrate):
            await attempt.over.wait()
        if attempt.hive is None:
            raise attempt.error or _stopping()
        return attempt.hive

    async def first(self, nodes: Sequence[str], narrate: Narrate) -> Hive | None:
        """Return the hive of the best of several nodes; None if none can be had: see `failure`.

        The next one is tried when one has failed, and also when it tells nothing for long: then
        the first that comes is taken.
        """
        with ExitStack() as listening:
            begun: list[Attempt] = []
            for node, following in zip(nodes, (*nodes[1:], ""), strict=True):
                begun.append(self.begin(node))
                listening.enter_context(begun[-1].heard_by(narrate))
                await self._settled(begun, is_last=not following)
                if hive := _hive_of(begun):
                    return hive
                if following:
                    narrate(Narration("queen", "skip", _skipped(node, begun[-1], following)))
            return None

    async def _settled(self, begun: Sequence[Attempt], *, is_last: bool) -> None:
        """Return when there is a hive, or none to wait for: of the last attempt, or of any."""
        waited_for = begun if is_last else begun[-1:]
        while not _hive_of(begun) and not all(one.over.is_set() for one in waited_for):
            left = float("inf") if is_last else begun[-1].left
            if left <= 0:
                return
            with trio.move_on_after(left):
                await self._ended.wait()

    async def _keep(self, node: str, attempt: Attempt) -> None:
        try:
            attempt.hive = await self._get(node, attempt.tell)
            self._failures.pop(node, None)
        except RbeeError as exc:
            attempt.error = exc
            self.note_failure(node, exc)
        finally:
            del self._running[node]
            attempt.over.set()
            self._ended.set()
            self._ended = trio.Event()


def _hive_of(begun: Iterable[Attempt]) -> Hive | None:
    return next((one.hive for one in begun if one.hive is not None), None)


def _skipped(node: str, attempt: Attempt, following: str) -> str:
    why = str(attempt.error) if attempt.error else f"no answer for {attempt.silent:.0f} s"
    return f"{node}: {why}; trying {following}"


def _stopping() -> RbeeError:
    return UnavailableError("the queen is stopping", code="queen_stopping")
