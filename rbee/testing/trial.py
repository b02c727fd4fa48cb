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
from rbee.testing.census import SESSION, Census
from rbee.testing.deaths import BUDGET, OWNERS
from rbee.testing.faults import (
    Cut,
    Field,
    FullDisk,
    MemoryLimit,
    PowerLoss,
    Reach,
    Signal,
    SshdDeath,
    doomed,
)
from rbee.testing.network_deaths import KILLING, LEASE
from rbee.testing.processes import Identity, LeakError, Leftover, is_running, title_of
from rbee.testing.rounds import Round
from rbee.testing.scene import BROKEN, CONTEXT, Request, Scene, wanted
from rbee.testing.verdict import Fault as Hit
from rbee.testing.world import POLL, World
from rbee.wire.messages import WorkerInfo

ANSWER = 15.0  # seconds in which a request ends or goes on, whatever has happened
HURT = 8.0  # seconds that a request may take in a cluster that is hurt
FENCED = LEASE + KILLING + 1.0
FROZEN = 0.5  # seconds in which something that is frozen would have died
NOTICED = 2.0  # seconds in which a queen hears that a hive has ended
STREAMS = 3
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
        self.doing = "taking shape"
        with trio.fail_after(self.world.workload.patience):
            await self._take_shape()
        async with trio.open_nursery() as nursery:
            scene = Scene(self.world.client or NOBODY, self.world.workload, nursery)
            self.doing = f"reaching {self.round.moment}"
            with trio.fail_after(self.world.workload.patience):
                await self._reach(scene)
            await trio.sleep(self.round.delay)
            await self._suffer(scene)
            nursery.cancel_scope.cancel()
        if self._gone:
            await self._bury()
        elif self.round.is_last and not self._lost_power:
            await self._end()
            await self._bury()
        if self._lost_power:
            self.doing = "sweeping"
            await self._sweep()
        self.doing = "looking for damage"
        if found := await self.world.damages():
            raise StormError("\n".join(found))

    # the cluster as the round wants it ------------------------------------------------------------
    async def _take_shape(self) -> None:
        world, round = self.world, self.round
        anew = round.moment == "starting" and round.fault.aim == Reach.ALL
        now = trio.current_time()
        waits = any(world.fenced.get(node, 0) > now for node in round.nodes)
        if world.cluster is not None and (anew or waits):
            await self._end()
            await self._bury()
        if world.cluster is None:
            await world.start()
        if not anew:
            await self._populate(await world.connect())

    async def _populate(self, client: AsyncClient) -> None:
        round = self.round
        fresh = {round.node} if round.moment == "starting" else set()
        async with trio.open_nursery() as nursery:
            for hive in await client.hives():
                if hive.node not in round.nodes or hive.node in fresh:
                    nursery.start_soon(client.stop_hive, hive.node)
        missing = {
            (node, number): wanted(self.world.workload, node, number)
            for number, node in enumerate(round.workers)
            if node not in fresh
        }
        async with trio.open_nursery() as nursery:
            for info in await client.workers():
                key = _key(info)
                if info.state == "ready" and key in missing and info.model == missing[key].model:
                    del missing[key]
                elif info.state != "failed":
                    nursery.start_soon(client.stop_worker, info.worker_id)
        async with trio.open_nursery() as nursery:
            for node in set(round.nodes) - fresh:
                nursery.start_soon(client.start_hive, node)
            for start in missing.values():
                nursery.start_soon(client.start_ready_worker, start)

    async def _workers(self, node: str) -> list[WorkerInfo]:
        assert self.world.client is not None
        infos = await self.world.client.workers()
        return [info for info in infos if info.node == node and info.state == "ready"]

    # its moment -----------------------------------------------------------------------------------
    async def _reach(self, scene: Scene) -> None:
        node, first = self.round.node, self.round.fault.blows[0]
        match self.round.moment:
            case "starting":
                if self.round.fault.aim != Reach.ALL:
                    scene.start_worker(node, 90)
                await self.world.until_there(*_first_seen(first.role, first.node, node))
            case "loading":
                before = len(self.world.census().find("worker", node))
                scene.start_worker(node, 91, state="loading")
                while len(self.world.census().find("worker", node)) <= before:
                    await trio.sleep(POLL)
            case "streaming":
                await self._stream(scene)
            case "swapping":
                for info in (await self._workers(node))[:1]:
                    scene.stop_worker(info)
                scene.start_worker(node, 92)
            case "stopping":
                await self._stop(scene)

    async def _stream(self, scene: Scene) -> None:
        for info in await scene.client.workers():
            if info.state == "ready" and len(scene.streams) < STREAMS:
                scene.stream(info)
        while any(stream.seen < 3 and not stream.end for stream in scene.streams):
            await trio.sleep(POLL)

    async def _stop(self, scene: Scene) -> None:
        """Begin to end what the fault will hit."""
        aim, node = self.round.fault.aim, self.round.node
        if aim == Reach.ALL or (aim == Reach.NOTHING and self.round.by_owner):
            self._order()
        elif aim in (Reach.NODE, Reach.NOTHING):
            scene.stop_hive(node)
        else:
            for info in (await self._workers(node))[:1]:
                scene.stop_worker(info)

    def _order(self) -> None:
        assert self.world.cluster is not None
        self.world.cluster.keeper.send_signal(signal.SIGTERM)
        self._ordered = True

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
        """Return who has nothing to do with it: the owners, other nodes' hives."""
        stopping = self.round.moment == "stopping"
        # What sshd does at a signal is its own affair.
        hit = {b.node for b in self.round.fault.blows if stopping or b.role == SESSION}
        return [
            one.identity
            for one in census.placed
            if one.identity not in lost
            and one.role in (*OWNERS, "guard A", "guard B", "hive")
            and (one.node not in hit or one.role in OWNERS)
        ]

    async def _wait_all(self, began: float) -> None:
        """The whole cluster ends: of itself, or because its keeper was told to."""
        freezes = self._frozen()
        assert self.world.cluster is not None
        keeper = self.world.cluster.keeper
        if ("keeper", signal.SIGINT) in [(b.role, b.number) for b in self._signals()]:
            await trio.sleep(0.3)  # the first one may have ended an answer only
            if keeper.poll() is None:
                keeper.send_signal(signal.SIGINT)
        if "keeper" in freezes:
            keeper.kill()
        within = BUDGET + (LEASE if self.round.fault.silent else 0)
        await self._reap(within)
        self.seconds = trio.current_time() - began
        self._gone = True

    async def _wait_dark(self, within: float) -> None:
        """After a power loss files stay, for the next daemon to sweep."""
        await self.world.wait_known_gone(within)
        with trio.fail_after(within):
            while any(one.kind == "process" for one in self.world.left()):
                await trio.sleep(POLL)

    @property
    def _lost_power(self) -> bool:
        return any(isinstance(blow, PowerLoss) for blow in self.round.fault.blows)

    async def _reap(self, within: float) -> None:
        if self._lost_power:
            await self._wait_dark(within)
        else:
            await self.world.wait_gone(within)
        assert self.world.cluster is not None
        with trio.fail_after(1):
            while self.world.cluster.keeper.poll() is None:
                await trio.sleep(POLL)

    def _signals(self) -> list[Signal]:
        return [blow for blow in self.round.fault.blows if isinstance(blow, Signal)]

    def _frozen(self) -> list[str]:
        return [blow.role for blow in self._signals() if blow.freezes]

    async def _endure(self, scene: Scene, spared: Collection[Identity]) -> None:
        """Nothing ends of itself, or only what waits for its lease: then the owner ends."""
        assert self.world.cluster is not None
        frozen = self._frozen()
        if "keeper" in frozen or "queen" in frozen:
            await self._wait_lease("keeper" in frozen)
        elif frozen:
            await trio.sleep(FROZEN)
            _check_alive(spared)
        else:
            with trio.move_on_after(HURT):
                await scene.ask(self.round.node)
            if not self.round.by_owner and not self._limits():
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

    def _limits(self) -> bool:
        return any(isinstance(blow, MemoryLimit) for blow in self.round.fault.blows)

    async def _wait_lease(self, of_keeper: bool) -> None:
        """A frozen owner: what it owns ends with its lease, the guards of a queen excepted."""
        began = trio.current_time()
        above = ("keeper",) if of_keeper else OWNERS
        with trio.fail_after(LEASE + KILLING):
            while any(
                one.role not in above for one in self.world.census().placed if one.role != SESSION
            ):
                await trio.sleep(POLL)
        self.seconds = trio.current_time() - began

    async def _wait_part(self, lost: Collection[Identity], began: float) -> None:
        within = KILLING + (LEASE if self.round.fault.silent else 0)
        with trio.move_on_after(within) as limit:
            while any(is_running(one) for one in lost):
                await trio.sleep(POLL / 3)
        if limit.cancelled_caught:
            await self._confess(lost, within)
        if lost:
            self.seconds = trio.current_time() - began

    async def _confess(self, lost: Collection[Identity], within: float) -> None:
        found = [
            Leftover("process", f"{title_of(one.pid)!r} [{one.pid}]", "under the fault", one.pid)
            for one in lost
            if is_running(one)
        ]
        raise LeakError(found, within)

    def _undo(self) -> None:
        assert self._field is not None
        for blow in reversed(self.round.fault.blows):
            blow.undo(self._field)

    # afterwards -----------------------------------------------------------------------------------
    async def _wait_requests(
        self, scene: Scene, before: list[int], spared: Collection[Identity]
    ) -> None:
        """Every request ends; a stream may go on as well."""
        with trio.move_on_after(ANSWER + (FENCED if self.round.fault.silent else 0)):
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
            if stream.end == BROKEN and not self._gone:
                raise StormError(f"{stream.what} ended without its terminal event")

    def _is_stalled(self, stream: Request, seen: int) -> bool:
        return not stream.end and (self._gone or stream.seen <= seen)

    async def _recover(self, scene: Scene, spared: Collection[Identity]) -> None:
        """What was spared lives, the node works again, and all that is there is accounted for."""
        self.doing = "recovering"
        _check_alive(spared)
        fenced = self._lost_touch()
        for node in fenced:
            self.world.fenced[node] = trio.current_time() + FENCED
        if self._lost_power:
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
        with trio.fail_after(NOTICED):
            while True:
                pids = {one.pid for one in self.world.census().placed}
                if all(hive.pid in pids for hive in await client.hives()):
                    return
                await trio.sleep(POLL)

    def _lost_touch(self) -> set[str]:
        """Return the nodes whose hive's end nobody has told to the queen."""
        blows = self.round.fault.blows
        deaf = {blow.node for blow in blows if isinstance(blow, Cut | SshdDeath | PowerLoss)}
        return deaf | {
            blow.node
            for blow in self._signals()
            if blow.role in (SESSION, "guard A") and blow.node != LOCALHOST
        }

    async def _end(self) -> None:
        """End the cluster in order, as its user does."""
        self.doing = "ending"
        self._order()
        await self._reap(BUDGET)

    async def _bury(self) -> None:
        """Look at what an ended cluster has said, and forget it."""
        world = self.world
        assert world.cluster is not None
        self.doing = "looking at what is left"
        if not self._lost_power:
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
            hit = Hit(role or "hive", number, self.round.moment)
            if not self._ordered or role in OWNERS:
                codes |= set(hit.exit_codes())
        return codes

    def _check_logs(self) -> None:
        if any(isinstance(blow, MemoryLimit | FullDisk) for blow in self.round.fault.blows):
            return
        if found := self.world.tracebacks():
            raise StormError("\n".join(found))

    async def _sweep(self) -> None:
        """The next daemons on a machine that lost its power clean what that left."""
        world, node = self.world, self.round.fault.blows[0].node
        if world.cluster is not None and node != LOCALHOST:
            await self._end()
            await world.forget()
        if world.cluster is None:
            await world.start()
        with trio.fail_after(world.workload.patience):
            client = await world.connect()
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


def _key(info: WorkerInfo) -> tuple[str, int]:
    return info.node, (info.max_model_len or 0) - CONTEXT - 1


def _first_seen(role: str, at: str, node: str) -> tuple[str, str]:
    return (role, at) if role and role != SESSION else ("guard A", node)


def _check_alive(spared: Collection[Identity]) -> None:
    if dead := [one for one in spared if not is_running(one)]:
        raise StormError(f"{len(dead)} died that must live: {dead}")
