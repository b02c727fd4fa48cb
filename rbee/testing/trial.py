"""One round of a storm in a world: its cluster, its moment, its fault, and what has to hold."""

from __future__ import annotations

import signal
from collections.abc import Collection

import attrs
import trio

from rbee.client import AsyncClient
from rbee.errors import RbeeError, leaves
from rbee.model import LOCALHOST
from rbee.process import log_tail
from rbee.remains import LEFT
from rbee.testing.blows import (
    Cut,
    Field,
    FullDisk,
    Impairment,
    MemoryLimit,
    PowerLoss,
    Reach,
    Signal,
    SshdDeath,
    doomed,
)
from rbee.testing.census import SESSION, Census
from rbee.testing.deaths import BUDGET, OWNERS
from rbee.testing.network_deaths import KILLING, LEASE
from rbee.testing.prelude import Prelude
from rbee.testing.processes import Identity, LeakError, Leftover, is_running, title_of
from rbee.testing.rounds import Round
from rbee.testing.scene import BROKEN, Request, Scene
from rbee.testing.verdict import Fault as Hit
from rbee.testing.world import POLL, World
from rbee.wire.messages import HiveInfo

ANSWER = 15.0  # seconds in which a stream goes on, whatever has happened, and a request ends
HURT = 8.0  # seconds that a request may take in a cluster that is hurt
FENCED = LEASE + KILLING + 1.0
HIVE = ("guard A", "guard B", "hive")
FROZEN = 0.5  # seconds in which something that is frozen would have died
NOTICED = 2.0  # seconds in which a queen hears that a hive has ended
NOBODY = AsyncClient("http://127.0.0.1:9")  # while there is no queen yet


class StormError(AssertionError):
    """Something did not hold, though nothing was left."""


@attrs.frozen
class Outcome:
    """What came of a round.

    Attributes:
        seconds: from the fault, or the order after it, until what it ends was gone; None if it ends
            nothing.
        leaked: whether something was left; ``problem`` tells what did not hold, "" if all did.
    """

    round: Round
    seconds: float | None
    leaked: bool = False
    problem: str = ""


async def run_round(world: World, round: Round) -> Outcome:
    """Run one round; what did not hold is in the outcome, not raised."""
    trial = Trial(world, round)
    try:
        await trial.run()
    except (StormError, LeakError, RbeeError, trio.TooSlowError, BaseExceptionGroup) as error:
        known = [one for one in leaves(error) if isinstance(one, _TOLD)]
        if len(known) != sum(1 for _ in leaves(error)):
            raise
        problem = "\n".join([f"{trial.doing}: {one!r}" for one in known] + trial.explain())
        await trial.give_up()
        leaked = any(isinstance(one, LeakError) for one in known)
        return Outcome(round, trial.seconds, leaked, problem)
    return Outcome(round, trial.seconds)


_TOLD = (StormError, LeakError, RbeeError, trio.TooSlowError)


@attrs.define(eq=False)
class Trial:
    """A round in progress; ``doing`` is what it is at."""

    world: World
    round: Round
    seconds: float | None = None
    doing: str = "beginning"
    _ordered: bool = False  # the cluster has been told to end
    _gone: bool = False
    _field: Field | None = None

    async def run(self) -> None:
        prelude = Prelude(self.world, self.round)
        if self.world.cluster is not None and (prelude.wants_new or prelude.waits):
            await self._end()
        self.doing = "taking shape"
        with trio.fail_after(self.world.workload.patience):
            await prelude.take_shape()
        async with trio.open_nursery() as nursery:
            scene = Scene(self.world.client or NOBODY, self.world.workload, nursery)
            self.doing = f"reaching {self.round.moment}"
            with trio.fail_after(self.world.workload.patience):
                await prelude.reach(scene, self._order)
            await trio.sleep(self.round.delay)
            await self._suffer(scene)
            nursery.cancel_scope.cancel()
        await self._conclude()

    async def _conclude(self) -> None:
        if self._gone:
            await self._bury()
        if self.round.fault.unswept:
            await self._sweep()
        elif self.round.is_last and self.world.cluster is not None:
            await self._end()
        self.doing = "looking for damage"
        if found := await self.world.damages():
            raise StormError("\n".join(found))

    # the fault ------------------------------------------------------------------------------------
    async def _suffer(self, scene: Scene) -> None:
        fault = self.round.fault
        self.doing = "striking"
        began = trio.current_time()
        lost, spared = await self._strike()
        self.doing = "waiting until it is gone"
        before = [stream.seen for stream in scene.streams]
        if self._ordered or fault.ends_all:
            await self._wait_all(began)
        elif fault.lasts:
            await self._endure(scene, spared)
        else:
            await self._wait_part(lost, began)
        self._undo()
        self.doing = "waiting for the requests"
        await self._wait_requests(scene, before, spared)
        if not self._gone:
            await self._recover(scene, spared)

    async def _strike(self) -> tuple[set[Identity], list[Identity]]:
        """Return what must end by itself, and what must live."""
        lost: set[Identity] = set()
        census: Census | None = None
        for pause, blow in self.round.fault.timed():
            if census is None or pause:
                await trio.sleep(pause)
                self._field = self.world.field()
                census = self._field.census
            assert self._field is not None
            lost |= doomed(blow, census)
            blow.strike(self._field)
        assert census is not None
        return lost, self._spared(census, lost)

    def _spared(self, census: Census, lost: Collection[Identity]) -> list[Identity]:
        """Return who is not to end: owners, hives, and all on nodes that are not hit."""
        fault, stopping = self.round.fault, self.round.moment == "stopping"
        hit = {self.round.node, *(blow.node for blow in fault.blows)}
        # What sshd does at a signal is its own affair; a bad network may be as good as none.
        unsure = {b.node for b in fault.blows if b.role == SESSION or isinstance(b, Impairment)}
        unsure |= hit if stopping else set()
        if any(pause for pause, _ in fault.timed()):  # a hive came up in between, and ends as well
            unsure |= {blow.node for blow in fault.blows if blow.reach == Reach.NODE}
        return [
            one.identity
            for one in census.placed
            if one.identity not in lost
            and one.role != SESSION
            and (one.role in OWNERS or one.node not in (unsure if one.role in HIVE else hit))
        ]

    def _order(self) -> None:
        assert self.world.cluster is not None
        self.world.cluster.keeper.send_signal(signal.SIGTERM)
        self._ordered = True

    async def _wait_all(self, began: float) -> None:
        """The whole cluster ends: of itself, or because its keeper was told to."""
        assert self.world.cluster is not None
        keeper = self.world.cluster.keeper
        if any((b.role, b.number) == ("keeper", signal.SIGINT) for b in self.round.fault.signals):
            await trio.sleep(0.3)  # the first one may have ended an answer only
            if keeper.poll() is None:
                keeper.send_signal(signal.SIGINT)
        if "keeper" in self.round.fault.frozen:
            keeper.kill()
        within = BUDGET + (LEASE if self.round.fault.silent else 0)
        await self._reap(within)
        self.seconds = trio.current_time() - began
        self._gone = True

    async def _wait_dark(self, within: float) -> None:
        """Wait for the processes only: the files stay, for the next daemon to sweep."""
        began = trio.current_time()
        await self.world.wait_known_gone(within)
        while left := [one for one in self.world.left() if one.kind == "process"]:
            if trio.current_time() - began > within:  # a child may have been on its way
                raise LeakError(left, within)
            await trio.sleep(POLL)

    async def _reap(self, within: float) -> None:
        if self.round.fault.unswept:
            await self._wait_dark(within)
        else:
            await self.world.wait_gone(within)
        assert self.world.cluster is not None
        with trio.fail_after(1):
            while self.world.cluster.keeper.poll() is None:
                await trio.sleep(POLL)

    async def _endure(self, scene: Scene, spared: Collection[Identity]) -> None:
        """Nothing ends of itself, or only what waits for its lease: then the owner ends."""
        assert self.world.cluster is not None
        frozen = self.round.fault.frozen
        if "keeper" in frozen or "queen" in frozen:
            await self._wait_lease("keeper" in frozen)
        elif frozen:
            await trio.sleep(FROZEN)
            _check_alive(spared)
        else:
            with trio.move_on_after(HURT):
                await scene.ask(self.round.node)
            if not self.round.by_owner and not self.round.fault.has(MemoryLimit):
                return
        began = trio.current_time()
        if "keeper" in frozen:
            self.world.cluster.keeper.kill()
        else:
            self._order()
        await self._reap(BUDGET + (LEASE if self.round.fault.silent else 0))
        if self.seconds is None:
            self.seconds = trio.current_time() - began
        self._gone = True

    async def _wait_lease(self, of_keeper: bool) -> None:
        """A frozen owner: what it owns ends with its lease, the guards of a queen excepted."""
        above = ("keeper",) if of_keeper else OWNERS
        placed = self.world.census().placed
        owned = [one.identity for one in placed if one.role not in (*above, SESSION)]
        began = trio.current_time()
        await _wait_ended(owned, LEASE + KILLING)
        if owned:
            self.seconds = trio.current_time() - began

    async def _wait_part(self, lost: Collection[Identity], began: float) -> None:
        await _wait_ended(lost, KILLING + (LEASE if self.round.fault.silent else 0))
        if lost:
            self.seconds = trio.current_time() - began

    def _undo(self) -> None:
        assert self._field is not None
        for blow in reversed(self.round.fault.blows):
            blow.undo(self._field)

    # afterwards -----------------------------------------------------------------------------------
    async def _wait_requests(
        self, scene: Scene, before: list[int], spared: Collection[Identity]
    ) -> None:
        """Every request ends; a stream may go on as well."""
        # A start that was not hit goes on; a real engine's begins with its import.
        limit = ANSWER + self.world.workload.start
        with trio.move_on_after(limit + (FENCED if self.round.fault.silent else 0)):
            for request in scene.requests:
                await request.over.wait()
        if open_ := [one.what for one in scene.requests if not one.over.is_set()]:
            raise StormError(f"no end of {open_}")
        with trio.move_on_after(ANSWER):
            while any(map(self._is_stalled, scene.streams, before)):
                await trio.sleep(POLL)
        for stream, seen in zip(scene.streams, before, strict=True):
            if self._is_stalled(stream, seen):
                raise StormError(f"{stream.what} neither goes on nor ends: {stream}")
        safe = {one.pid for one in spared}
        for stream in scene.streams:
            if stream.worker in safe and stream.end not in ("", "end") and not self._gone:
                raise StormError(f"{stream.what} was not hit, and ended with {stream.error}")
        for request in (*scene.requests, *scene.streams):
            if request.end == BROKEN and not self._may_break:
                raise StormError(f"{request.what} ended without its terminal event")

    @property
    def _may_break(self) -> bool:
        """Whether the queen had no chance to tell of each end."""
        fault = self.round.fault
        killed = [b for b in fault.signals if b.role in OWNERS and b.number == signal.SIGKILL]
        return self._gone and bool(killed or fault.lasts or fault.has(PowerLoss))

    def _is_stalled(self, stream: Request, seen: int) -> bool:
        return not stream.end and (self._gone or stream.seen <= seen)

    async def _recover(self, scene: Scene, spared: Collection[Identity]) -> None:
        """What was spared lives, the node works again, and all that is there is accounted for."""
        self.doing = "recovering"
        _check_alive(spared)
        fenced = self._lost_touch()
        for node in fenced:
            self.world.fenced[node] = trio.current_time() + FENCED
        if self.round.fault.unswept:
            return  # what it left is the next daemon's
        if self.round.node not in fenced:
            with trio.fail_after(self.world.workload.patience):
                await self._until_noticed(scene.client)
                answer = await scene.ask(self.round.node)
            if answer.end != "end":
                raise StormError(f"the next {answer.what} failed: {answer.end}: {answer.error}")
        self.doing = "counting"
        with trio.fail_after(BUDGET + 5):
            await self.world.wait_balanced(BUDGET)
        self._check_logs()

    async def _until_noticed(self, client: AsyncClient) -> None:
        """Wait until the queen has heard of each end, which takes her a moment."""
        dead: list[HiveInfo] = []
        with trio.move_on_after(NOTICED + (2 * LEASE if self.round.fault.silent else 0)):
            while True:
                pids = {one.pid for one in self.world.census().placed}
                hives = [hive for hive in await client.hives() if hive.state not in LEFT]
                dead = [hive for hive in hives if hive.pid not in pids]
                if not dead:
                    return
                await trio.sleep(POLL)
        raise StormError(f"the queen lists hives that have ended: {dead}")

    def _lost_touch(self) -> set[str]:
        """Return the nodes whose hive's end nobody has told to the queen."""
        blows = self.round.fault.blows
        deaf = {blow.node for blow in blows if isinstance(blow, Cut | SshdDeath | PowerLoss)}
        return deaf | {
            blow.node
            for blow in self.round.fault.signals
            if blow.role in (SESSION, "guard A") and blow.node != LOCALHOST
        }

    async def _end(self) -> None:
        """End the cluster in order, as its user does."""
        self.doing = "ending"
        self._order()
        await self._reap(BUDGET)
        await self._bury()

    async def _bury(self) -> None:
        """Look at what an ended cluster has said, and forget it."""
        world = self.world
        assert world.cluster is not None
        self.doing = "looking at what is left"
        if not self.round.fault.unswept:
            await world.wait_gone(1)
        code, codes = world.cluster.keeper.poll(), self._exit_codes()
        if code not in codes:
            raise StormError(f"the keeper exited with {code}, not with {codes}")
        if lost := world.gpu_losses():
            raise LeakError(lost, 0)
        self._check_logs()
        await world.forget()
        world.clear_logs()
        self._ordered = self._gone = False

    def _exit_codes(self) -> set[int | None]:
        codes: set[int | None] = {128 + signal.SIGTERM} if self._ordered else set()
        for blow in self.round.fault.blows:
            number = blow.number if isinstance(blow, Signal) else signal.SIGKILL
            role = blow.role
            if isinstance(blow, PowerLoss) and blow.node == LOCALHOST:
                role = "keeper"
            moment = self.round.moment
            if moment == "stopping" and not self._ordered:
                moment = "idle"  # what was stopping is only a part
            hit = Hit(role or "hive", number, moment)
            if not self._ordered or role in OWNERS:
                codes |= set(hit.exit_codes())
        return codes

    def _check_logs(self) -> None:
        if self.round.fault.has(MemoryLimit, FullDisk):
            return
        if found := self.world.tracebacks():
            raise StormError("\n".join(found))

    async def _sweep(self) -> None:
        """The next daemons on a machine clean what nobody was left to clean."""
        self.doing = "sweeping"
        world = self.world
        if world.cluster is not None and self.round.fault.unswept != {LOCALHOST}:
            await self._end()  # a new queen knows of no fence
        if world.cluster is None:
            await world.start()
        with trio.fail_after(world.workload.patience):
            client = await world.connect()
            for node in self.round.fault.unswept:
                await client.start_hive(node)
        with trio.fail_after(BUDGET + 5):
            await world.wait_balanced(BUDGET)

    # a round that did not hold --------------------------------------------------------------------
    def explain(self) -> list[str]:
        """Return the ends of the logs."""
        lines = []
        for path in self.world.logs():
            lines += [f"--- {path}", log_tail(path, 1500)]
        return lines

    async def give_up(self) -> None:
        """Clear the field for the next round."""
        if self._field is not None:
            self._undo()
        self.world.wreck()
        if self.world.cluster is not None:
            await self.world.forget()
        self.world.clear_logs()


async def _wait_ended(identities: Collection[Identity], within: float) -> None:
    left = set(identities)
    with trio.move_on_after(within):
        while left := {one for one in left if is_running(one)}:
            await trio.sleep(POLL / 3)
        return
    raise LeakError(
        [
            Leftover("process", f"{title_of(one.pid)!r} [{one.pid}]", "under the fault", one.pid)
            for one in left
        ],
        within,
    )


def _check_alive(spared: Collection[Identity]) -> None:
    if dead := [one for one in spared if not is_running(one)]:
        raise StormError(f"{len(dead)} died that must live: {dead}")
