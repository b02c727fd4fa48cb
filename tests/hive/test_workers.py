"""One worker's life in its hive, in simulated time: what its news tell and what ends it."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee import guard, remains
from rbee.errors import (
    ChildExitedError,
    ConflictError,
    InsufficientError,
    MachineError,
    NotFoundError,
    RbeeError,
    UnavailableError,
)
from rbee.gpus import Usage, usage
from rbee.hive import workers as module
from rbee.hive.cards import Look
from rbee.hive.room import Memory
from rbee.hive.workers import HiveSetup, News, Provision, Workers
from rbee.home import Home
from rbee.log_files import KEPT
from rbee.models.catalog import Catalog, Entry
from rbee.models.child import Narrate
from rbee.models.footprint import MemoryPlan
from rbee.models.use import is_used
from rbee.testing.fakes import FakeConnect, FakeLauncher, FakePeer
from rbee.wire.messages import StartWorker, WorkerInfo, WorkerNarration, WorkerReady

REQUEST = StartWorker("words", engine="echo", owner="queen-1")


@attrs.frozen
class Local:
    reference: str
    directory: Path
    served_names: tuple[str, ...]
    context: int = 100


def memory(budget: int | None = None) -> Memory:
    """Count 100 bytes for every worker with a model."""

    def check(plan: MemoryPlan, available: int, *, model: str, bound: str) -> None:
        raise InsufficientError(
            f"full: {model}{bound}", required=plan.required, available=available
        )

    async def plan(local: Local, request: StartWorker) -> MemoryPlan:
        await trio.lowlevel.checkpoint()
        if request.model == "uncountable":
            raise OverflowError("int too large")
        return MemoryPlan(100, 0, 0)

    async def free(backend: str, device: str) -> None:
        await trio.lowlevel.checkpoint()

    return Memory(plan=plan, free=free, check=check, budget=budget)


async def nothing(request: StartWorker, narrate: Narrate) -> None:
    await trio.lowlevel.checkpoint()


@attrs.define
class Hive:
    """The workers of a hive with a reader of their news."""

    workers: Workers
    launch: FakeLauncher
    peers: dict[str, FakePeer]
    _news: trio.MemoryReceiveChannel[News]
    heard: list[News] = attrs.field(factory=list)

    async def settle(self) -> None:
        await wait_all_tasks_blocked()
        while True:
            try:
                self.heard.append(self._news.receive_nowait())
            except trio.WouldBlock:
                return

    async def states(self, worker_id: str) -> list[str]:
        return [info.state for info in await self.infos(worker_id)]

    async def infos(self, worker_id: str) -> list[WorkerInfo]:
        await self.settle()
        told = [item for item in self.heard if isinstance(item, WorkerInfo)]
        return [info for info in told if info.worker_id == worker_id]

    async def loading(self, request: StartWorker = REQUEST) -> str:
        worker_id = self.workers.start(request).worker_id
        await wait_all_tasks_blocked()
        return worker_id

    def ready(self, worker_id: str) -> None:
        self.workers.ready(WorkerReady(worker_id, "http://127.0.0.1:1", "words", "cpu", "0"))


@asynccontextmanager
async def open_hive(
    home: Home,
    *,
    provision: Provision = nothing,
    budget: int | None = None,
    look: Look = usage,
    **launch: object,
) -> AsyncGenerator[Hive, None]:
    setup = HiveSetup(id="hive-1", home=home, run_dir=home.run / "h1", token="secret", node="n1")
    launcher = FakeLauncher(**launch)
    connect = FakeConnect(launcher)
    workers = Workers(setup, launcher, provision, memory=memory(budget), connect=connect, look=look)
    with workers.news.subscribe() as news:
        async with workers.open():
            yield Hive(workers, launcher, connect.peers, news)


# starting -------------------------------------------------------------------------------------
async def test_a_worker_is_started_then_loading_then_ready_then_stopped(home: Home) -> None:
    async with open_hive(home) as hive:
        info = hive.workers.start(REQUEST)
        assert (info.state, info.model, info.owner, info.node) == (
            "started",
            "words",
            "queen-1",
            "n1",
        )
        assert await hive.states(info.worker_id) == ["started", "loading"]
        assert hive.workers.infos()[0].pid == hive.launch.running[info.worker_id].pid
        hive.ready(info.worker_id)
        await hive.workers.stop(info.worker_id)
        assert await hive.states(info.worker_id) == [
            "started", "loading", "ready", "stopping", "stopped",
        ]  # fmt: skip
        assert hive.workers.infos() == []
        assert hive.launch.running == {}


async def test_a_worker_is_told_where_its_hive_and_its_directory_are(home: Home) -> None:
    async with open_hive(home) as hive:
        hive.workers.url = "http://127.0.0.1:9"
        worker_id = await hive.loading()
        config = hive.launch.configs[worker_id]
        assert (config.hive_url, config.token, config.port) == (
            "http://127.0.0.1:9",
            "secret",
            8001,
        )
        assert Path(config.run_dir).parent == home.run / "h1"
        assert config.spec.owner == "queen-1"


async def test_a_model_is_brought_first_and_gives_its_names(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async def bring(request: StartWorker, narrate: Narrate) -> Local:
        narrate("download", "10 of 20", share=0.5)
        await trio.sleep(5)
        return Local("pypi:words", home.root / "words", ("words", "w"))

    async with open_hive(home, provision=bring) as hive:
        info = hive.workers.start(REQUEST)
        await hive.settle()
        assert hive.launch.running == {}
        await trio.sleep(6)
        spec = hive.launch.configs[info.worker_id].spec
        assert (spec.model, spec.model_dir) == ("pypi:words", str(home.root / "words"))
        assert spec.served_names == ("words", "w")
        await hive.settle()
        told = [item for item in hive.heard if isinstance(item, WorkerNarration)]
        assert [(item.action, item.text, item.share) for item in told] == [
            ("download", "10 of 20", 0.5),
            ("load", "pypi:words with echo on cpu", None),
        ]
        assert hive.workers.infos()[0].served_names == ("words", "w")


async def test_what_a_loading_worker_tells_is_passed_on_until_it_is_ready(home: Home) -> None:
    async with open_hive(home) as hive:
        worker_id = await hive.loading()
        told = WorkerNarration(worker_id, "worker", "load", "weights", 0.5)
        hive.workers.take_progress(told)
        (info,) = hive.workers.infos()
        assert (info.state, info.progress, info.share) == ("loading", "weights", 0.5)
        hive.ready(worker_id)
        hive.workers.take_progress(told)
        (info,) = hive.workers.infos()
        assert (info.state, info.progress, info.share) == ("ready", "", None)
        await hive.settle()
        assert hive.heard.count(told) == 1
        with pytest.raises(NotFoundError):
            hive.workers.take_progress(attrs.evolve(told, worker_id="worker-x"))


async def test_a_model_of_the_catalog_is_in_use_until_its_worker_has_ended(home: Home) -> None:
    async def bring(request: StartWorker, narrate: Narrate) -> Local:
        return Local("pypi:words", home.models / "words", ("words",))

    (home.models / "words").mkdir()
    Catalog(home.models).save("words", Entry("pypi:words", "pypi", "1", (), "float32"))
    with trio.fail_after(10):
        async with open_hive(home, provision=bring) as hive:
            worker_id = hive.workers.start(REQUEST).worker_id
            with hive.workers.news.subscribe() as news:
                async for item in news:
                    if isinstance(item, WorkerInfo) and item.state == "loading":
                        break
            assert is_used(home.models, "words")
            await hive.workers.stop(worker_id)
            assert not is_used(home.models, "words")


async def test_what_cannot_work_is_refused_before_anything_starts(home: Home) -> None:
    async with open_hive(home) as hive:
        with pytest.raises(NotFoundError, match="no engine 'none'"):
            hive.workers.start(attrs.evolve(REQUEST, engine="none"))
        assert hive.workers.infos() == []
        await hive.settle()
        assert hive.heard == []


async def test_a_stopping_hive_starts_nothing(home: Home) -> None:
    async with open_hive(home) as hive:
        pass
    with pytest.raises(UnavailableError, match="stopping"):
        hive.workers.start(REQUEST)


async def test_the_engine_is_warmed_up_while_the_model_comes(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    order: list[str] = []

    async def bring(request: StartWorker, narrate: Narrate) -> None:
        await trio.sleep(1)
        order.append("model")

    async def warm_up(engine: str, narrate: Narrate) -> None:
        order.append(engine)

    async with open_hive(home) as hive:
        hive.workers._provision, hive.workers._warm_up = bring, warm_up
        hive.workers.start(REQUEST)
        await trio.sleep(2)
    assert order == ["echo", "model"]


# failing --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InsufficientError("no memory", required=5), "insufficient", "no memory"),
        (ExceptionGroup("x", [ConflictError("taken")]), "conflict", "taken"),
        (OSError(24, "Too many open files"), "internal", "OSError: [Errno 24] Too many open files"),
    ],
)
async def test_a_launch_that_fails_is_a_failed_worker_and_the_hive_lives(
    home: Home, error: Exception, code: str, message: str
) -> None:
    async with open_hive(home, error=error) as hive:
        worker_id = await hive.loading()
        last = (await hive.infos(worker_id))[-1]
        assert (last.state, last.error.code, last.error.message) == ("failed", code, message)
        assert hive.workers.infos() == []
        hive.launch.error = None
        assert await hive.states(await hive.loading()) == ["started", "loading"]


async def test_a_model_that_cannot_be_brought_is_a_failed_worker(home: Home) -> None:
    async def refuse(request: StartWorker, narrate: Narrate) -> None:
        raise NotFoundError("no such model", hint="another", code="unknown_model")

    async with open_hive(home, provision=refuse) as hive:
        last = (await hive.infos(await hive.loading()))[-1]
    assert (last.error.code, last.error.hint) == ("unknown_model", "another")


async def test_a_bug_takes_the_hive_down(home: Home) -> None:
    with pytest.RaisesGroup(KeyError, flatten_subgroups=True):
        async with open_hive(home, error=KeyError("bug")) as hive:
            hive.workers.start(REQUEST)
            await trio.sleep_forever()


async def test_an_end_that_nobody_asked_for_is_failed_with_the_logs_tail(home: Home) -> None:
    async with open_hive(home) as hive:
        worker_id = await hive.loading()
        home.log_file(worker_id).write_text("loading\nboom\n")
        hive.launch.running[worker_id].end(137)
        last = (await hive.infos(worker_id))[-1]
        assert (last.state, last.error.code) == ("failed", ChildExitedError.code)
        assert last.error.message == f"worker {worker_id} ended unasked with signal SIGKILL"
        assert last.error.details["log"] == "loading\nboom\n"
        assert last.error.hint == f"rbee-keeper logs --worker {worker_id} --node n1"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (
            json.dumps({"code": "corrupt", "message": "m", "hint": "h", "details": {"a": 1}}),
            "corrupt",
        ),
        (json.dumps({"code": "corrupt", "message": "m", "details": {"hint": 1}}), "corrupt"),
        ("{", "child_exited"),
        ("[1]", "child_exited"),
        ('"text"', "child_exited"),
        ('{"code": "corrupt"}', "child_exited"),
    ],
)
async def test_what_the_worker_said_last_is_the_error(home: Home, line: str, code: str) -> None:
    async with open_hive(home) as hive:
        worker_id = await hive.loading()
        home.log_file(worker_id).write_text(f"12:01 x rbee-error {line}\nmore\n")
        hive.launch.running[worker_id].end(1)
        error = (await hive.infos(worker_id))[-1].error
    assert error.code == code
    assert error.details["log"].splitlines()[-1] == "more"


async def test_of_several_errors_that_a_worker_said_the_last_one_counts(home: Home) -> None:
    async with open_hive(home) as hive:
        worker_id = await hive.loading()
        lines = [f'rbee-error {{"code": "{code}", "message": ""}}\n' for code in ("one", "two")]
        home.log_file(worker_id).write_text("".join(lines))
        hive.launch.running[worker_id].end(1)
        assert (await hive.infos(worker_id))[-1].error.code == "two"


async def test_a_worker_that_is_never_ready_fails_after_the_limit(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home, stopping={"words": 3.0}) as hive:
        start = trio.current_time()
        worker_id = await hive.loading()
        await trio.sleep(module.LOAD_LIMIT + 4)
        last = (await hive.infos(worker_id))[-1]
        assert (last.state, last.error.code) == ("failed", "load_timeout")
        assert hive.launch.running == {}
        assert trio.current_time() - start == module.LOAD_LIMIT + 4


async def test_a_launch_that_hangs_fails_after_the_limit(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home, starting=float("inf")) as hive:
        worker_id = await hive.loading()
        await trio.sleep(module.LOAD_LIMIT + 1)
        assert (await hive.infos(worker_id))[-1].error.code == "load_timeout"


async def test_an_engine_whose_import_hangs_is_a_failed_worker(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async def hang(engine: str, narrate: Narrate) -> None:
        await trio.sleep_forever()

    async with open_hive(home, starting=float("inf")) as hive:
        hive.workers._warm_up = hang
        worker_id = await hive.loading()
        await trio.sleep(2 * module.LOAD_LIMIT + 1)
        assert (await hive.infos(worker_id))[-1].error.code == "load_timeout"


async def test_a_ready_worker_has_no_limit(home: Home, autojump_clock: trio.abc.Clock) -> None:
    async with open_hive(home) as hive:
        worker_id = await hive.loading(attrs.evolve(REQUEST, keep_alive=-1.0))
        await trio.sleep(module.LOAD_LIMIT - 1)
        hive.ready(worker_id)
        await trio.sleep(module.LOAD_LIMIT * 10)
        assert (await hive.states(worker_id))[-1] == "ready"


# ready ----------------------------------------------------------------------------------------
async def test_the_ready_callback_is_passed_on_with_the_address(home: Home) -> None:
    async with open_hive(home) as hive:
        passed: list[WorkerInfo] = []
        hive.workers.on_ready = passed.append
        worker_id = await hive.loading()
        hive.ready(worker_id)
        assert [(info.state, info.url) for info in passed] == [("ready", "http://127.0.0.1:1")]


async def test_the_ready_callback_of_a_stranger_is_refused(home: Home) -> None:
    async with open_hive(home) as hive:
        with pytest.raises(NotFoundError) as info:
            hive.ready("worker-0")
        assert info.value.code == "unknown_worker"


async def test_a_worker_that_is_being_stopped_does_not_become_ready(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home, stopping={"words": 3.0}) as hive:
        worker_id = await hive.loading()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hive.workers.stop, worker_id)
            await trio.sleep(1)
            with pytest.raises(ConflictError, match="is being stopped"):
                hive.ready(worker_id)
        assert await hive.states(worker_id) == ["started", "loading", "stopping", "stopped"]


# stopping -------------------------------------------------------------------------------------
async def test_a_stop_is_silent_and_returns_when_nothing_is_left(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home, stopping={"words": 3.0}) as hive:
        worker_id = await hive.loading()
        start = trio.current_time()
        await hive.workers.stop(worker_id)
        assert trio.current_time() - start == 3
        assert hive.launch.running == {}
        assert (await hive.infos(worker_id))[-1].error is None


async def test_two_may_stop_one_worker_at_once(home: Home, autojump_clock: trio.abc.Clock) -> None:
    async with open_hive(home, stopping={"words": 3.0}) as hive:
        worker_id = await hive.loading()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hive.workers.stop, worker_id)
            nursery.start_soon(hive.workers.stop, worker_id)
        assert (await hive.states(worker_id))[-1] == "stopped"
        with pytest.raises(NotFoundError, match=f"no worker '{worker_id}' on n1"):
            await hive.workers.stop(worker_id)


@pytest.mark.parametrize("at", [0.5, 1.5])
async def test_a_worker_can_be_stopped_while_it_is_being_started(
    home: Home, autojump_clock: trio.abc.Clock, at: float
) -> None:
    async def bring(request: StartWorker, narrate: Narrate) -> None:
        await trio.sleep(1)

    async with open_hive(home, provision=bring, starting=1.0) as hive:
        worker_id = hive.workers.start(REQUEST).worker_id
        await trio.sleep(at)
        await hive.workers.stop(worker_id)
        assert await hive.states(worker_id) == ["started", "stopping", "stopped"]
        assert hive.launch.configs == {}


async def test_a_hive_that_ends_stops_all_side_by_side(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home, stopping={"a": 1.0, "b": 4.0, "c": 2.0}) as hive:
        for model in "abc":
            await hive.loading(attrs.evolve(REQUEST, model=model))
        start = trio.current_time()
    assert trio.current_time() - start == 4
    assert hive.launch.running == {}


async def test_only_an_owners_workers_are_stopped_side_by_side(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home, stopping={"a": 1.0, "b": 4.0}) as hive:
        for model in "ab":
            await hive.loading(attrs.evolve(REQUEST, model=model))
        other = await hive.loading(attrs.evolve(REQUEST, owner="queen-2"))
        start = trio.current_time()
        await hive.workers.stop_owned_by("queen-1")
        assert trio.current_time() - start == 4
        assert list(hive.launch.running) == [other]
        await hive.workers.stop_owned_by("nobody")


async def test_an_owners_worker_may_end_by_itself_while_it_is_being_stopped(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home, stopping={"words": 3.0}) as hive:
        one, two = await hive.loading(), await hive.loading()
        hive.launch.running[one].end(0)
        await hive.workers.stop_owned_by("queen-1")
        assert hive.launch.running == {}
        assert (await hive.states(two))[-1] == "stopped"


# logs -----------------------------------------------------------------------------------------
async def test_old_logs_go_and_those_of_running_workers_stay(home: Home) -> None:
    async with open_hive(home) as hive:
        running = await hive.loading()
        for name in (running, *(f"worker-{number}" for number in range(40))):
            home.log_file(name).touch()
            os.utime(home.log_file(name), (1, 1))
        newest = home.log_file("worker-39")
        os.utime(newest)
        await hive.workers.stop(await hive.loading())
        left = list(home.logs.iterdir())
        assert len(left) <= KEPT + 1
        assert {newest, home.log_file(running)} <= set(left)


# idle -----------------------------------------------------------------------------------------
async def until_over(hive: Hive, worker_id: str) -> float:
    """Return the seconds until a worker has ended, and hold its end to be silent."""
    start = trio.current_time()
    with trio.fail_after(1000):
        await hive.workers.get(worker_id).ended.wait()
    last = (await hive.infos(worker_id))[-1]
    assert (last.state, last.error) == ("stopped", None)
    return trio.current_time() - start


async def test_a_worker_without_work_is_unloaded_after_its_keep_alive(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home) as hive:
        worker_id = await hive.loading(attrs.evolve(REQUEST, keep_alive=60.0))
        hive.ready(worker_id)
        assert await until_over(hive, worker_id) == pytest.approx(60, abs=1)
        assert "stopping" in await hive.states(worker_id)


async def test_a_new_worker_stays_for_its_first_use_whatever_its_keep_alive(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home) as hive:
        worker_id = await hive.loading(attrs.evolve(REQUEST, keep_alive=0.0))
        hive.ready(worker_id)
        assert await until_over(hive, worker_id) == pytest.approx(module.FIRST_USE, abs=1)


@pytest.mark.parametrize("keeps", [{"running": 1}, {"keep_alive": -1.0}, {"answers": False}])
async def test_one_that_works_or_is_to_stay_or_is_silent_is_not_unloaded(
    home: Home, autojump_clock: trio.abc.Clock, keeps: dict[str, object]
) -> None:
    async with open_hive(home) as hive:
        worker_id = await hive.loading(attrs.evolve(REQUEST, keep_alive=60.0))
        hive.ready(worker_id)
        await wait_all_tasks_blocked()
        for name, value in keeps.items():
            setattr(hive.peers[worker_id], name, value)
        await trio.sleep(1000)
        assert len(hive.workers.infos()) == 1


async def test_a_request_may_say_how_long_the_worker_stays_after_it(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home) as hive:
        worker_id = await hive.loading()
        hive.ready(worker_id)
        await trio.sleep(20)
        peer = hive.peers[worker_id]
        peer.keep_alive, peer.since = 30.0, trio.current_time()
        assert await until_over(hive, worker_id) == pytest.approx(30, abs=1)


async def test_what_a_worker_does_is_in_the_news(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home) as hive:
        worker_id = await hive.loading()
        hive.ready(worker_id)
        await wait_all_tasks_blocked()
        hive.peers[worker_id].running = 3
        await trio.sleep(6)
        assert (await hive.infos(worker_id))[-1].running == 3


async def test_an_idle_worker_goes_for_a_model_that_needs_its_memory(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async def bring(request: StartWorker, narrate: Narrate) -> Local:
        return Local(request.model, home.models, (request.model,))

    async with open_hive(home, provision=bring, budget=150) as hive:
        first = await hive.loading(attrs.evolve(REQUEST, model="a"))
        hive.ready(first)
        await wait_all_tasks_blocked()
        hive.peers[first].is_fresh = False
        await trio.sleep(1)
        second = await hive.loading(attrs.evolve(REQUEST, model="b"))
        await trio.sleep(1)
        assert (await hive.states(first))[-1] == "stopped"
        assert list(hive.launch.running) == [second]
        told = [item.action for item in hive.heard if isinstance(item, WorkerNarration)]
        assert told == ["load", "unload", "load"]
        hive.ready(second)
        await trio.sleep(1)
        hive.peers[second].running = 1
        third = await hive.loading(attrs.evolve(REQUEST, model="c"))
        await trio.sleep(100)
        assert (await hive.infos(third))[-1].error.code == "insufficient"
        assert list(hive.launch.running) == [second]


async def test_a_model_whose_memory_cannot_be_counted_is_a_failed_worker(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async def bring(request: StartWorker, narrate: Narrate) -> Local:
        return Local(request.model, home.models, (request.model,))

    async with open_hive(home, provision=bring) as hive:
        worker_id = await hive.loading(attrs.evolve(REQUEST, model="uncountable"))
        error = (await hive.infos(worker_id))[-1].error
        assert error.code == "bad_input"
        assert "too large" in error.message


async def test_a_new_worker_waits_for_whom_it_was_started_for(
    home: Home, autojump_clock: trio.abc.Clock
) -> None:
    async def bring(request: StartWorker, narrate: Narrate) -> Local:
        return Local(request.model, home.models, (request.model,))

    async with open_hive(home, provision=bring, budget=150) as hive:
        first = await hive.loading(attrs.evolve(REQUEST, model="a"))
        second = await hive.loading(attrs.evolve(REQUEST, model="b"))
        hive.ready(first)
        await trio.sleep(module.FIRST_USE - 1)
        assert list(hive.launch.running) == [first]
        await trio.sleep(2)
        assert list(hive.launch.running) == [second]


# what does not end ------------------------------------------------------------------------------
LEFT = remains.stuck("w1", [(1, guard.start_time(1))])


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[MachineError]:
    """Return what each further look finds left of a worker: an error each, then nothing."""
    found: list[MachineError] = []

    async def sweep(directory: Path, *, within: float) -> int:
        await trio.lowlevel.checkpoint()
        if found:
            raise found.pop()
        return 0

    monkeypatch.setattr(module, "sweep", sweep)
    return found


async def test_a_worker_is_stuck_and_not_stopped_while_something_of_it_is_left(
    home: Home, left: list[MachineError], autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home, left=LEFT) as hive:
        worker_id = await hive.loading()
        hive.ready(worker_id)
        left += [LEFT] * 3
        for _ in range(2):
            with pytest.raises(RbeeError, match="does not end") as caught:
                await hive.workers.stop(worker_id)
            assert caught.value.details["processes"][0]["pid"] == 1
        (info,) = hive.workers.infos()
        assert (info.state, info.error.code) == ("stuck", "stuck")
        start = trio.current_time()
        await trio.sleep(100)
        infos = await hive.infos(worker_id)
        assert [info.state for info in infos][-3:] == ["stopping", "stuck", "stopped"]
        assert infos[-1].error is None
        assert hive.workers.infos() == []
        assert trio.current_time() - start == 100


async def test_one_that_ended_unasked_has_failed_once_nothing_is_left(
    home: Home, left: list[MachineError], autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home) as hive:
        worker_id = await hive.loading()
        left += [remains.unverified("w1", [7]), LEFT]
        hive.launch.running[worker_id].end(1)
        await trio.sleep(100)
        assert (await hive.states(worker_id))[-3:] == ["stuck", "unverified", "failed"]


async def test_a_worker_that_died_while_its_guard_goes_on_is_stuck(
    home: Home,
    left: list[MachineError],
    autojump_clock: trio.abc.Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "children", lambda pid: [pid + 1])  # above any real pid: gone
    async with open_hive(home, left=LEFT) as hive:
        worker_id = await hive.loading()
        hive.ready(worker_id)
        left += [LEFT]
        await trio.sleep(20)
        assert "stuck" not in await hive.states(worker_id)
        hive.peers[worker_id].answers = False
        await trio.sleep(20)
        states = await hive.states(worker_id)
        assert states[states.index("unresponsive") :] == ["unresponsive", "stuck", "failed"]


async def test_a_hive_that_stops_does_not_wait_for_what_is_stuck(
    home: Home, left: list[MachineError], autojump_clock: trio.abc.Clock
) -> None:
    async with open_hive(home, left=LEFT) as hive:
        await hive.loading()
        left += [LEFT] * 100
        start = trio.current_time()
    assert trio.current_time() - start < 1
    assert hive.launch.running == {}


# memory of GPUs ---------------------------------------------------------------------------------
async def test_a_worker_is_not_stopped_before_its_gpu_has_its_memory_back(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    any_backend = SimpleNamespace(check=lambda spec: None)
    monkeypatch.setattr(module, "engine_kind", lambda name: any_backend)
    used = [100 << 20, 30 << 30, 30 << 30]  # before it, then after it
    looked = trio.Event()

    def look(device: str) -> list[Usage]:
        trio.from_thread.run_sync(looked.set)
        return [Usage(int(device), used.pop(0) if used else 100 << 20)]

    with trio.fail_after(10):
        async with open_hive(home, look=look) as hive:
            request = attrs.evolve(REQUEST, backend="cuda", device="1")
            worker_id = hive.workers.start(request).worker_id
            await looked.wait()
            await wait_all_tasks_blocked(0.05)
            await hive.workers.stop(worker_id)
            assert (await hive.states(worker_id))[-1] == "stopped"
    assert used == []
