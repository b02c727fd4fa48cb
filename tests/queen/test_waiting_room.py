"""A request gets a slot when its turn comes, and nobody is stuck whatever happens to workers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.errors import QueueFullError, RbeeError, UnavailableError
from rbee.queen.aliases import Aliases
from rbee.queen.assignments import Assignments
from rbee.queen.attempts import Attempts
from rbee.queen.limits import Limits
from rbee.queen.places import Places
from rbee.queen.sessions import KEPT, Sessions
from rbee.queen.slots import Slots
from rbee.queen.tries import ask_until_answered
from rbee.queen.waiting_room import Asked, Terms
from rbee.web.router import MAX_BODY
from rbee.wire.messages import ErrorDetail, StartWorker, TaskRequest, WorkerInfo
from tests.queen.test_jobs import FakeHives

REQUEST = TaskRequest("words", prompt="hello", engine="echo")


@attrs.define(eq=False)
class Scene:
    """Requests that hold the worker they get until they are told to end."""

    hives: FakeHives
    assignments: Assignments
    nursery: trio.Nursery
    got: list[tuple[str, str]] = attrs.field(factory=list)
    told: dict[str, list[int]] = attrs.field(factory=dict)
    failed: dict[str, RbeeError] = attrs.field(factory=dict)
    scopes: dict[str, trio.CancelScope] = attrs.field(factory=dict)
    fails: dict[str, RbeeError] = attrs.field(factory=dict)

    async def ask(self, name: str, terms: Terms | None = None, asked: Asked = REQUEST) -> None:
        """Begin a request and return once it has a worker or waits."""
        told = self.told.setdefault(name, [])
        terms = attrs.evolve(terms or Terms(), tell=told.append)
        self.nursery.start_soon(self._ask, name, asked, terms)
        await wait_all_tasks_blocked()

    async def _ask(self, name: str, asked: Asked, terms: Terms) -> None:
        async def hold(worker: WorkerInfo) -> None:
            self.got.append((name, worker.worker_id))
            if worker.worker_id in self.fails:
                raise self.fails[worker.worker_id]
            await trio.sleep_forever()

        with trio.CancelScope() as self.scopes[name]:
            try:
                await ask_until_answered(
                    self.assignments, asked, lambda _: None, hold, lambda: False, terms
                )
            except RbeeError as exc:
                self.failed[name] = exc

    async def end(self, name: str) -> None:
        """End a request, as its client, its deadline and DELETE do."""
        self.scopes[name].cancel()
        await wait_all_tasks_blocked()

    @property
    def waiting(self) -> int:
        return len(self.assignments.room)


@asynccontextmanager
async def open_scene(limits: Limits | None = None) -> AsyncGenerator[Scene, None]:
    async def nobody_knows(start: StartWorker) -> None:
        await trio.lowlevel.checkpoint()

    hives = FakeHives()
    attempts = Attempts(hives.get)
    places = Places(hives.look, attempts, nobody_knows)
    assignments = Assignments(hives, places, Aliases(Path("/nowhere/config.toml")), limits)
    async with attempts.open(), assignments.open(), trio.open_nursery() as nursery:
        with trio.fail_after(100):
            yield Scene(hives, assignments, nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def clock(autojump_clock: trio.abc.Clock) -> None:
    pass


# turns ----------------------------------------------------------------------------------------
async def test_a_slot_that_is_freed_goes_to_the_first_by_priority_then_by_arrival() -> None:
    async with open_scene() as scene:
        scene.hives.put("w", "ready", slots=1)
        await scene.ask("running")
        for name, priority in (("late", 5), ("one", 0), ("two", 0), ("urgent", -1)):
            await scene.ask(name, Terms(priority))
        assert scene.waiting == 4
        for name in ("running", "urgent", "one", "two"):
            await scene.end(name)
        assert [name for name, _ in scene.got] == ["running", "urgent", "one", "two", "late"]
        await scene.end("late")
        assert (scene.waiting, scene.assignments.room.slots.total()) == (0, 0)


async def test_who_leaves_frees_his_place_at_once() -> None:
    async with open_scene(Limits(waiting_per_model=2)) as scene:
        scene.hives.put("w", "ready", slots=1)
        for name in ("running", "one", "two", "three"):
            await scene.ask(name)
        assert isinstance(scene.failed["three"], QueueFullError)
        await scene.end("one")
        await scene.ask("four")
        assert "four" not in scene.failed
        await scene.end("running")
        await scene.end("two")
        assert [name for name, _ in scene.got] == ["running", "two", "four"]


async def test_a_turn_that_comes_as_the_client_leaves_is_passed_on() -> None:
    async with open_scene() as scene:
        scene.hives.put("w", "ready", slots=1)
        for name in ("running", "one", "two"):
            await scene.ask(name)
        scene.scopes["one"].cancel()
        await scene.end("running")
        assert [name for name, _ in scene.got][-1] == "two"


async def test_the_bound_of_all_models_holds_too() -> None:
    async with open_scene(Limits(waiting=1)) as scene:
        await scene.ask("one")
        await scene.ask("other", asked=attrs.evolve(REQUEST, model="other"))
        assert isinstance(scene.failed["other"], QueueFullError)


async def test_the_bodies_of_those_that_wait_are_bounded_and_freed() -> None:
    async with open_scene(Limits(waiting_size=100)) as scene:
        scene.hives.put("w", "ready", slots=1)
        await scene.ask("running", Terms(size=1000))
        await scene.ask("big", Terms(size=90))
        await scene.ask("refused", Terms(size=11))
        assert "no more than 100" in str(scene.failed["refused"])
        await scene.end("big")
        await scene.ask("next", Terms(size=100))
        assert set(scene.failed) == {"refused"}


async def test_the_bodies_of_those_that_are_read_are_bounded_and_freed() -> None:
    async with open_scene(Limits(waiting_size=MAX_BODY + 10)) as scene:
        room = scene.assignments.room
        with room.reading() as one:
            one(MAX_BODY)
            with suppress(ValueError), room.reading() as two:
                two(10)
                with pytest.raises(QueueFullError, match="no more than"):
                    two(1)
                raise ValueError
            with room.reading() as three:  # the other one has given back what it held
                three(10)
        assert (room._read, room._read_size) == (0, 0)


async def test_the_greatest_body_may_be_read_alone_whatever_the_bound() -> None:
    async with open_scene(Limits(waiting_size=0)) as scene:
        with scene.assignments.room.reading() as take:
            take(MAX_BODY)
            with pytest.raises(QueueFullError):
                take(1)


async def test_a_request_that_insists_on_a_busy_node_delays_no_other() -> None:
    async with open_scene() as scene:
        scene.hives.put("w1", "ready", slots=1)
        scene.hives.put("w2", "ready", slots=1, node="n2")
        await scene.ask("a", asked=attrs.evolve(REQUEST, node="localhost"))
        await scene.ask("b", asked=attrs.evolve(REQUEST, node="localhost"))
        await scene.ask("c")
        assert scene.got == [("a", "w1"), ("c", "w2")]


async def test_what_needs_no_slot_does_not_wait_behind_what_does() -> None:
    async with open_scene() as scene:
        for name in ("a", "b"):
            await scene.ask(name)
        await scene.ask("tokens", Terms(takes_slot=False))
        scene.hives.put("w", "ready", slots=1)
        await wait_all_tasks_blocked()
        assert {name for name, _ in scene.got} == {"a", "tokens"}


async def test_positions_are_told_as_they_change_and_not_more_often() -> None:
    async with open_scene() as scene:
        scene.hives.put("w", "ready", slots=1)
        for name in ("running", "one", "two", "three", "last"):
            await scene.ask(name)
        assert scene.told["last"] == [3]
        for name in ("running", "one", "two"):  # at once
            await scene.end(name)
        await trio.sleep(1)
        told = {"running": [], "one": [], "two": [1, 0], "three": [2, 1], "last": [3, 2, 0]}
        assert scene.told == told  # the first change at once


async def test_what_the_engine_has_no_part_in_does_not_wait() -> None:
    async with open_scene() as scene:
        scene.hives.put("w", "ready", slots=1)
        await scene.ask("running")
        await scene.ask("tokens", Terms(takes_slot=False))
        assert scene.got[-1] == ("tokens", "w")
        await scene.end("tokens")
        assert scene.assignments.room.slots.total() == 1


async def test_the_operators_number_of_slots_wins() -> None:
    async with open_scene(Limits(slots=2)) as scene:
        scene.hives.put("w", "ready", slots=1)
        for name in ("one", "two", "three"):
            await scene.ask(name)
        assert (len(scene.got), scene.waiting) == (2, 1)


# workers that come and go ---------------------------------------------------------------------
async def test_a_worker_that_becomes_ready_gets_no_more_than_it_can_do() -> None:
    async with open_scene() as scene:
        for name in ("one", "two", "three"):
            await scene.ask(name)
        assert len(scene.hives.hive.started) == 1
        scene.hives.put("worker-1", "ready", slots=2)
        await wait_all_tasks_blocked()
        assert {name for name, _ in scene.got} == {"one", "two"}
        await scene.ask("four")
        await scene.end("one")
        assert [name for name, _ in scene.got][2:] == ["three"]


async def test_when_the_only_worker_goes_those_that_wait_get_another_in_their_order() -> None:
    async with open_scene() as scene:
        scene.hives.put("w", "ready", slots=1)
        for name in ("running", "one", "two"):
            await scene.ask(name)
        scene.hives.put("w", "stopping", slots=1)
        await wait_all_tasks_blocked()
        assert len(scene.hives.hive.started) == 1  # for both
        await scene.end("running")
        assert scene.waiting == 2
        scene.hives.put("worker-1", "ready", slots=1)
        await wait_all_tasks_blocked()
        assert scene.got[-1] == ("one", "worker-1")


async def test_when_no_worker_comes_those_that_wait_are_told_why() -> None:
    async with open_scene() as scene:
        scene.hives.put("w", "ready", slots=1)
        await scene.ask("running")
        await scene.ask("one")
        scene.hives.put("w", "stopped")
        await wait_all_tasks_blocked()
        scene.hives.put("worker-1", "failed", error=ErrorDetail("machine", "boom"))
        await wait_all_tasks_blocked()
        assert scene.failed["one"].message == "boom"
        assert scene.waiting == 0


async def test_a_second_worker_serves_those_that_wait_for_the_first() -> None:
    async with open_scene() as scene:
        scene.hives.put("w1", "ready", slots=1)
        for name in ("running", "one"):
            await scene.ask(name)
        scene.hives.put("w2", "loading")
        await wait_all_tasks_blocked()
        scene.hives.put("w2", "ready", slots=1)
        await wait_all_tasks_blocked()
        assert scene.got[-1] == ("one", "w2")


async def test_a_worker_that_drains_gets_nothing_new() -> None:
    async with open_scene() as scene:
        scene.hives.put("w1", "ready", slots=2)
        scene.hives.put("w2", "ready", slots=2)
        scene.hives.put("w1", "stopping", slots=2)
        for name in ("one", "two", "three"):
            await scene.ask(name)
        assert scene.got == [("one", "w2"), ("two", "w2")]


async def test_a_request_whose_worker_has_gone_keeps_its_place() -> None:
    async with open_scene(Limits(waiting_per_model=1)) as scene:
        scene.hives.put("w1", "ready", slots=1)
        scene.hives.put("w2", "ready", slots=1)
        scene.fails["w1"] = UnavailableError("gone")
        await scene.ask("other", asked=attrs.evolve(REQUEST, node="localhost"))
        assert scene.got == [("other", "w1"), ("other", "w2")]
        scene.fails["w3"] = UnavailableError("gone")
        await scene.ask("waits")
        scene.hives.put("w3", "ready", slots=1)
        await wait_all_tasks_blocked()
        assert scene.got[-1] == ("waits", "w3")  # and is back in a queue that is full
        await scene.ask("late")
        assert isinstance(scene.failed["late"], QueueFullError)
        assert "waits" not in scene.failed
        await scene.end("other")
        assert scene.got[-1] == ("waits", "w2")


# which one ------------------------------------------------------------------------------------
async def test_the_worker_with_the_fewest_requests_is_taken_and_ties_go_round() -> None:
    async with open_scene() as scene:
        for worker in ("w1", "w2", "w3"):
            scene.hives.put(worker, "ready", running=9 if worker == "w1" else 0)
        for name in "abcdef":
            await scene.ask(name)
        assert [worker for _, worker in scene.got] == ["w1", "w2", "w3"] * 2
        await scene.end("b")
        await scene.ask("g")
        assert scene.got[-1] == ("g", "w2")
        for name in "acdefg":
            await scene.end(name)
        scene.got.clear()
        for name in "uvw":  # one after the other
            await scene.ask(name)
            await scene.end(name)
        assert {worker for _, worker in scene.got} == {"w1", "w2", "w3"}


async def test_a_session_stays_at_its_worker_while_that_has_room() -> None:
    async with open_scene() as scene:
        scene.hives.put("w1", "ready", slots=2)
        scene.hives.put("w2", "ready", slots=2)
        for name, session in (("a", "s"), ("b", "s"), ("c", "s"), ("d", "")):
            await scene.ask(name, Terms(session=session))
        assert scene.got == [("a", "w1"), ("b", "w1"), ("c", "w2"), ("d", "w2")]
        for name in "abcd":
            await scene.end(name)
        await scene.ask("e", Terms(session="s"))
        assert scene.got[-1] == ("e", "w2")  # where it was last
        scene.hives.put("w2", "stopping", slots=2)
        await scene.ask("f", Terms(session="s"))
        assert scene.got[-1] == ("f", "w1")


def test_the_sessions_that_are_longest_silent_are_forgotten() -> None:
    sessions = Sessions()
    workers = [WorkerInfo("w", "words", "ready")]
    for number in range(KEPT + 5):
        sessions.note("words", str(number), workers[0])
        sessions.note("words", "0", workers[0])
    assert len(sessions) == KEPT
    assert sessions.find("words", "0", workers) == workers[0]
    assert sessions.find("words", "1", workers) is None
    assert sessions.find("other", "0", workers) is None
    assert sessions.find("words", "", workers) is None


def test_workers_that_have_gone_are_not_remembered() -> None:
    slots = Slots(lambda worker: 1)
    for number in range(3):
        worker = WorkerInfo(f"w{number}", "words", "ready")
        slots.take(worker)
        slots.free(worker)
    slots.forget_others({"w2"})
    assert (set(slots._last), slots.total(), dict(slots._at)) == ({"w2"}, 0, {})
