"""Every job gets its one terminal event, whatever its worker, its reader or the queen does.

All of it holds for both forms: attached to a connection, here one in memory, and kept in a log.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.lowlevel
from trio.testing import wait_all_tasks_blocked

from rbee.broadcast import Broadcast
from rbee.errors import (
    BadInputError,
    CancelledError,
    MachineError,
    NotFoundError,
    OwnerGoneError,
    RbeeError,
    UnavailableError,
)
from rbee.home import Home
from rbee.queen.aliases import Aliases
from rbee.queen.assignments import Assignments
from rbee.queen.attempts import PATIENCE, Attempts
from rbee.queen.candidates import NodeView
from rbee.queen.hives import Hives
from rbee.queen.job import Job
from rbee.queen.jobs import Jobs
from rbee.queen.limits import WAITING
from rbee.queen.places import Places
from rbee.queen.tasks import read_log
from rbee.registry import Registry
from rbee.web.out import AsgiOut
from rbee.web.poller import open_poller
from rbee.web.upstream import open_upstreams
from rbee.wire import sse
from rbee.wire.messages import (
    End,
    ErrorDetail,
    HiveInfo,
    Queued,
    StartWorker,
    TaskRequest,
    Token,
    WorkerInfo,
    WorkerNarration,
)
from tests.queen.test_hives import INFO, make_hives

SLOW = 60.0  # seconds until a dead node turns out to be one
REQUEST = TaskRequest("words", prompt="hello", engine="echo")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
TOKENS = sse.encode_token("a", 1) + sse.encode_token("\nevent: end\n", 2)
END = sse.encode(End(1, 2, "stop", 1.0, 2.0))
ANSWER = [TOKENS, END]

Serve = Callable[[trio.SocketStream], Any]


@pytest.fixture(autouse=True, params=["attached", "kept"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test with both forms of a job; here nobody tells of a worker's end."""
    monkeypatch.setattr("rbee.queen.assignments.TOLD_WITHIN", 0.05)
    monkeypatch.setattr(Started, "form", request.param)
    return str(request.param)


@attrs.define(eq=False)
class FakeHive:
    """Starts workers that stay as they are put."""

    hives: FakeHives
    info: HiveInfo = INFO
    token: str = "secret"
    starting: trio.Lock = attrs.field(factory=trio.Lock)
    started: list[StartWorker] = attrs.field(factory=list)
    asked: trio.Event = attrs.field(factory=trio.Event)
    relays: list[trio.CancelScope] = attrs.field(factory=list)
    refuses: list[RbeeError] = attrs.field(factory=list)

    def way_to(self, url: str) -> str:
        return url

    @contextmanager
    def relaying(self) -> Iterator[trio.CancelScope]:
        with trio.CancelScope() as scope:
            self.relays.append(scope)
            yield scope

    async def start_worker(self, request: StartWorker) -> WorkerInfo:
        await trio.lowlevel.checkpoint()
        if self.refuses:
            raise self.refuses.pop()
        self.started.append(request)
        self.asked.set()
        return WorkerInfo(
            f"worker-{len(self.started)}", request.model, "started", engine=request.engine,
            owner=request.owner, node=self.info.node,
        )  # fmt: skip


@attrs.define(eq=False)
class FakeHives:
    """What jobs see of a queen's hives, with one hive that is always there.

    ``others``: further nodes' hives. ``dead``: nodes that turn out to be so after `SLOW` seconds.
    """

    url: str = ""
    queen_id: str = "queen-1"
    workers: Registry[str, WorkerInfo] = attrs.field(factory=Registry)
    failures: dict[str, WorkerInfo] = attrs.field(factory=dict)
    narrations: Broadcast[WorkerNarration] = attrs.field(factory=Broadcast)
    others: dict[str, FakeHive] = attrs.field(factory=dict)
    looks: int = 0
    dead: set[str] = attrs.field(factory=set)
    hive: FakeHive = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.hive = FakeHive(self)

    async def get(self, node: str, narrate: object) -> FakeHive:
        await trio.lowlevel.checkpoint()
        if node in self.dead:
            await trio.sleep(SLOW)
            raise UnavailableError(f"node {node} does not answer", code="unreachable")
        if node not in ("localhost", *self.others):
            raise NotFoundError(f"no node {node!r}", code="unknown_node")
        return self.others.get(node, self.hive)

    async def look(self) -> list[NodeView]:
        """Return views on nodes that are all the same."""
        self.looks += 1
        await trio.lowlevel.checkpoint()
        return [NodeView("localhost"), *map(NodeView, self.others)]

    def running(self, node: str) -> FakeHive:
        return self.hive

    def note_started(self, info: WorkerInfo) -> None:
        self.workers.set(info.worker_id, info)

    def take_info(self, info: WorkerInfo) -> None:
        self.workers.set(info.worker_id, info)

    def put(self, worker_id: str, state: str, url: str = "", **more: Any) -> None:
        """Let a worker be in a state."""
        info = WorkerInfo(
            worker_id, "words", state, engine="echo", url=url or self.url, owner="queen-1", **more
        )
        if state in ("failed", "stopped"):
            self.failures[worker_id] = info
            self.workers.remove(worker_id)
        else:
            self.workers.set(worker_id, info)


@attrs.define(eq=False)
class Reader:
    """Whoever asked for a job, and what he has got; he leaves when ``scope`` is cancelled."""

    job: Job
    data: bytes = b""
    refusal: RbeeError | None = None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    done: trio.Event = attrs.field(factory=trio.Event)

    async def attach(self, jobs: Jobs) -> None:
        await self._read(lambda: jobs.attach(self.job, AsgiOut(trio.sleep_forever, self._send)))

    async def come_for(self, jobs: Jobs) -> None:
        async def keep_and_read() -> None:
            await jobs.keep(self.job, 100)
            assert self.job.log is not None
            await read_log(self.job.log, 0, self._take)

        await self._read(keep_and_read)

    async def _read(self, read: Callable[[], Any]) -> None:
        try:
            with self.scope:
                await read()
        except RbeeError as error:
            self.refusal = error
        self.done.set()

    async def _send(self, message: Any) -> None:
        await self._take(message.get("body", b""))

    async def _take(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.data += data


@attrs.define(eq=False)
class Started:
    """Jobs, each with a reader."""

    jobs: Jobs
    nursery: trio.Nursery
    form = "attached"

    def __len__(self) -> int:
        return len(self.jobs)

    def start(self, request: TaskRequest) -> Reader:
        reader = Reader(self.jobs.accept(request))
        read = reader.attach if self.form == "attached" else reader.come_for
        self.nursery.start_soon(read, self.jobs)
        return reader

    def cancel(self, *readers: Reader) -> None:
        for reader in readers:
            self.jobs.cancel(reader.job.id, CancelledError("enough"))


@asynccontextmanager
async def open_jobs(serve: Serve | None = None) -> AsyncGenerator[tuple[Started, FakeHives], None]:
    """Run jobs against one worker's port; ``serve`` gets each connection after its request."""

    async def nobody_knows(start: StartWorker) -> None:
        await trio.lowlevel.checkpoint()

    async def connection(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await (serve or answer)(stream)
        await stream.aclose()

    hives = FakeHives()
    attempts = Attempts(hives.get)
    aliases = Aliases(Path("/nowhere/config.toml"))
    places = Places(hives.look, attempts, nobody_knows)
    assignments = Assignments(hives, places, aliases)
    async with (
        trio.open_nursery() as nursery,
        open_poller() as poller,
        open_upstreams(poller) as upstreams,
    ):
        jobs = Jobs(assignments, aliases, upstreams, lambda: OwnerGoneError("the queen ended"))
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, connection, listeners)
        hives.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        async with attempts.open(), jobs.open():
            yield Started(jobs, nursery), hives
        await wait_all_tasks_blocked()  # readers outlive the jobs
        nursery.cancel_scope.cancel()


async def answer(stream: trio.SocketStream) -> None:
    await stream.send_all(HEAD)
    for part in ANSWER:
        await stream.send_all(part)


async def read(reader: Reader) -> list[Any]:
    """Return a job's events as its reader gets them; there is exactly one terminal one."""
    with trio.fail_after(100):  # of a clock that may jump
        await reader.done.wait()
    assert reader.refusal is None
    events = [sse.event_from(*pair) for pair in sse.Decoder().feed(reader.data)]
    names = [type(event).__name__ for event in events]
    assert names[0] == "Queued"
    assert [name in ("End", "Error") for name in names].count(True) == 1
    assert names[-1] in ("End", "Error")
    return events


async def code_of(reader: Reader) -> str:
    return (await read(reader))[-1].code


async def refusal_of(reader: Reader) -> str:
    """Return the code of what came before anything else."""
    await reader.done.wait()
    assert reader.refusal is not None
    assert reader.data == b""
    return reader.refusal.code


# good ends ------------------------------------------------------------------------------------
@pytest.mark.parametrize("node", [None, "localhost"])
async def test_a_ready_workers_answer_is_passed_through(node: str | None) -> None:
    async with open_jobs() as (jobs, hives):
        hives.put("worker-1", "ready")
        reader = jobs.start(attrs.evolve(REQUEST, node=node))
        job = reader.job
        await wait_all_tasks_blocked()
        assert await read(reader) == [
            Queued(job.id, 0), Token("a", 1), Token("\nevent: end\n", 2),
            End(1, 2, "stop", 1.0, 2.0),
        ]  # fmt: skip
        assert hives.hive.started == []
        assert hives.looks == 0  # no disk, no registry
        assert len(jobs) == 0
        info = job.info()
        assert (info.state, info.worker_id, info.node) == ("ended", "worker-1", "localhost")
        assert info.created <= info.started <= info.ended
        assert info.tokens_out == (None if info.attached else 2)


async def test_a_worker_is_started_and_waited_for_and_its_narration_told() -> None:
    async with open_jobs() as (jobs, hives):
        job = jobs.start(REQUEST)
        await wait_all_tasks_blocked()
        assert [start.model for start in hives.hive.started] == ["words"]
        hives.narrations.send(WorkerNarration("worker-1", "hive", "load", "words"))
        hives.narrations.send(WorkerNarration("worker-2", "hive", "load", "another"))
        hives.put("worker-1", "loading")
        await wait_all_tasks_blocked()
        hives.put("worker-1", "ready")
        events = await read(job)
        told = [(event.actor, event.text) for event in events if hasattr(event, "actor")]
        assert told[:2] == [("queen", "a worker for words"), ("hive", "words")]
        assert [actor for actor, text in told[2:]] == ["queen"]
        assert type(events[-1]) is End


async def test_two_jobs_for_one_model_start_one_worker() -> None:
    async with open_jobs() as (jobs, hives):
        one, two = jobs.start(REQUEST), jobs.start(REQUEST)
        await wait_all_tasks_blocked()
        hives.put("worker-1", "ready")
        for job in (one, two):
            assert type((await read(job))[-1]) is End
        assert len(hives.hive.started) == 1


async def test_jobs_for_one_model_start_one_worker_however_they_come_to_its_node(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_jobs() as (jobs, hives):
        linux = hives.others["linux"] = FakeHive(hives, attrs.evolve(INFO, node="linux"))
        hives.dead.add("localhost")
        free = [jobs.start(REQUEST) for _ in range(3)]
        await trio.sleep(1)
        assert linux.started == []
        asked = [jobs.start(attrs.evolve(REQUEST, node="linux")) for _ in range(2)]
        await wait_all_tasks_blocked()
        assert len(linux.started) == 1  # it does not wait for a node that is not its
        await trio.sleep(PATIENCE)
        assert len(linux.started) == 1
        assert [len(jobs), len(hives.workers)] == [5, 1]
        jobs.cancel(*free, *asked)


async def test_a_worker_that_is_not_there_any_more_is_replaced_once() -> None:
    async with open_jobs() as (jobs, hives):
        with trio.socket.socket() as dead:
            await dead.bind(("127.0.0.1", 0))  # bound, not listening
            hives.put("worker-0", "ready", url=f"http://127.0.0.1:{dead.getsockname()[1]}")
            job = jobs.start(REQUEST)
            await hives.hive.asked.wait()
            await wait_all_tasks_blocked()
            hives.put("worker-1", "ready")
            assert type((await read(job))[-1]) is End
        gone = hives.workers.get("worker-0")
        assert gone is not None
        assert gone.state == "stopping"


# bad ends -------------------------------------------------------------------------------------
async def test_a_worker_that_fails_to_start_ends_the_job_with_its_error_and_log() -> None:
    async with open_jobs() as (jobs, hives):
        job = jobs.start(REQUEST)
        await wait_all_tasks_blocked()
        detail = ErrorDetail("child_exited", "it ended", "look", {"log": "one\ntwo\n"})
        hives.put("worker-1", "failed", error=detail)
        error = (await read(job))[-1]
        assert (error.code, error.hint) == ("child_exited", "look")
        assert error.message == "it ended\nthe end of its log:\n  one\n  two"


async def test_a_worker_that_is_stopped_while_it_is_waited_for_ends_the_job() -> None:
    async with open_jobs() as (jobs, hives):
        job = jobs.start(REQUEST)
        await wait_all_tasks_blocked()
        hives.put("worker-1", "stopped")
        assert await code_of(job) == "worker_stopped"


async def test_an_unknown_node_ends_the_job() -> None:
    async with open_jobs() as (jobs, _):
        assert await code_of(jobs.start(attrs.evolve(REQUEST, node="mars"))) == "unknown_node"


@pytest.mark.parametrize("cut", [1, len(TOKENS) - 1, len(TOKENS), len(TOKENS) + 5, -1])
async def test_a_worker_that_dies_anywhere_in_its_answer_ends_the_job(cut: int) -> None:
    async def die(stream: trio.SocketStream) -> None:
        await stream.send_all(HEAD + b"".join(ANSWER)[:cut])

    async with open_jobs(die) as (jobs, hives):
        hives.put("worker-1", "ready")
        events = await read(jobs.start(REQUEST))
    assert events[-1].code == "worker_died"
    whole = {1: 0, len(TOKENS) - 1: 1}.get(cut, 2)
    assert [type(event) for event in events[1:-1]] == [Token] * whole


@pytest.mark.parametrize("head", [b"", HEAD])
async def test_a_job_whose_worker_dies_before_its_answer_kills_one_more_and_no_third(
    head: bytes,
) -> None:
    async def die(stream: trio.SocketStream) -> None:
        await stream.send_all(head)

    async with open_jobs(die) as (jobs, hives):
        hives.put("worker-0", "ready")
        job = jobs.start(REQUEST)
        await hives.hive.asked.wait()
        await wait_all_tasks_blocked()
        hives.put("worker-1", "ready")
        assert await code_of(job) == "worker_died"
    assert len(hives.hive.started) == 1


async def test_a_job_whose_node_is_lost_before_its_answer_goes_elsewhere() -> None:
    asked = trio.Event()

    async def first_silent(stream: trio.SocketStream) -> None:
        if asked.is_set():
            await answer(stream)
            return
        asked.set()
        await trio.sleep_forever()

    async with open_jobs(first_silent) as (jobs, hives):
        hives.put("worker-0", "ready")
        job = jobs.start(REQUEST)
        await asked.wait()
        hives.hive.relays[0].cancel()
        await hives.hive.asked.wait()
        await wait_all_tasks_blocked()
        hives.put("worker-1", "ready")
        with trio.fail_after(2):
            assert type((await read(job))[-1]) is End


async def test_a_refusal_by_the_worker_is_the_jobs_error() -> None:
    body = json.dumps({"error": {"code": "bad_input", "message": "too long", "hint": "less"}})
    head = f"HTTP/1.1 400 X\r\nContent-Length: {len(body)}\r\n\r\n"

    async def refuse(stream: trio.SocketStream) -> None:
        await stream.send_all((head + body).encode())

    async with open_jobs(refuse) as (jobs, hives):
        hives.put("worker-1", "ready")
        error = (await read(jobs.start(REQUEST)))[-1]
    assert (error.code, error.message, error.hint) == ("bad_input", "too long", "less")


async def wait_for(is_so: Callable[[], bool]) -> None:
    with trio.fail_after(2):
        while not is_so():  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.01)


async def silent(stream: trio.SocketStream) -> None:
    await stream.send_all(HEAD + TOKENS)
    await trio.sleep_forever()


async def test_a_deadline_ends_the_job() -> None:
    async with open_jobs(silent) as (jobs, hives):
        hives.put("worker-1", "ready")
        assert await code_of(jobs.start(attrs.evolve(REQUEST, deadline=0.1))) == "deadline"


@pytest.mark.parametrize("deadline", [0.0, -1.0])
async def test_a_deadline_that_has_passed_is_refused(deadline: float) -> None:
    async with open_jobs() as (jobs, _):
        with pytest.raises(BadInputError, match="deadline must be greater than 0"):
            jobs.start(attrs.evolve(REQUEST, deadline=deadline))
        assert len(jobs) == 0


async def test_a_cancelled_job_says_so_and_stays_cancelled() -> None:
    async with open_jobs(silent) as (jobs, hives):
        hives.put("worker-1", "ready")
        reader = jobs.start(REQUEST)
        await wait_for(lambda: TOKENS[-20:] in reader.data)
        assert reader.job.info().state == "started"
        jobs.cancel(reader)
        assert await code_of(reader) == "cancelled"
        assert reader.job.info().state == "cancelled"
        jobs.cancel(reader)


async def test_a_job_that_is_cancelled_while_it_waits_for_a_worker_says_so() -> None:
    async with open_jobs() as (jobs, hives):
        reader = jobs.start(REQUEST)
        await hives.hive.asked.wait()
        assert reader.job.info().state == "queued"
        jobs.cancel(reader)
        assert await code_of(reader) == "cancelled"


async def test_what_ends_a_job_after_its_terminal_event_is_not_told() -> None:
    """The worker has said all, but its answer goes on: the deadline comes too late."""

    async def linger(stream: trio.SocketStream) -> None:
        await answer(stream)
        await trio.sleep_forever()

    async with open_jobs(linger) as (jobs, hives):
        hives.put("worker-1", "ready")
        reader = jobs.start(attrs.evolve(REQUEST, deadline=0.2))
        assert type((await read(reader))[-1]) is End
        assert reader.job.info().state == "ended"


async def test_a_queen_that_ends_tells_every_reader_why() -> None:
    async with open_jobs(silent) as (jobs, hives):
        hives.put("worker-1", "ready")
        waiting = jobs.start(attrs.evolve(REQUEST, model="other"))
        running = jobs.start(REQUEST)
        await wait_for(lambda: TOKENS[-20:] in running.data)
    assert [await code_of(reader) for reader in (waiting, running)] == ["owner_gone", "owner_gone"]
    with pytest.raises(OwnerGoneError):
        jobs.start(REQUEST)


async def test_a_reader_who_went_away_ends_his_job_only_if_it_is_his(form: str) -> None:
    async with open_jobs(silent) as (jobs, hives):
        hives.put("worker-1", "ready")
        gone, other = jobs.start(REQUEST), jobs.start(REQUEST)
        await wait_for(lambda: TOKENS[-20:] in gone.data and TOKENS[-20:] in other.data)
        gone.scope.cancel()
        await wait_all_tasks_blocked()
        assert len(jobs) == (1 if form == "attached" else 2)
        jobs.cancel(gone, other)
        assert await code_of(other) == "cancelled"
    assert len(jobs) == 0


# hives ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [MachineError("no memory"), UnavailableError("gone")])
async def test_a_hive_that_cannot_be_started_is_a_plain_refusal(
    home: Home, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def fail(self: Hives, *args: object) -> None:
        async with trio.open_nursery():
            raise error

    monkeypatch.setattr(Hives, "_run", fail)
    hives = make_hives(home)
    async with hives.open():
        with pytest.raises(type(error), match=str(error)):
            await hives.get("localhost", lambda narration: None)
        with pytest.raises(NotFoundError, match="no node 'mars'; known: localhost"):
            await hives.get("mars", lambda narration: None)


def test_news_and_answers_may_overtake_each_other(home: Home) -> None:
    hives = make_hives(home)
    started = WorkerInfo("worker-1", "words", "started", owner="queen-1")
    hives.take_info(attrs.evolve(started, state="failed"))
    hives.note_started(started)
    assert list(hives.workers) == []
    assert hives.failures["worker-1"].state == "failed"
    ready = attrs.evolve(started, worker_id="worker-2", state="ready")
    hives.take_info(ready)
    hives.note_started(attrs.evolve(ready, state="started"))
    assert list(hives.workers) == [ready]


def test_workers_of_other_queens_are_not_ours(home: Home) -> None:
    hives = make_hives(home)
    hives.take_info(WorkerInfo("worker-1", "words", "ready", owner="queen-2"))
    assert list(hives.workers) == []


# waiting for a worker -------------------------------------------------------------------------
async def test_no_more_jobs_than_the_bound_wait_for_one_model(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_jobs() as (jobs, hives):
        waiting = [jobs.start(REQUEST) for _ in range(WAITING)]
        await wait_all_tasks_blocked()
        assert await refusal_of(jobs.start(REQUEST)) == "queue_full"
        other = jobs.start(attrs.evolve(REQUEST, model="other"))
        await wait_all_tasks_blocked()
        assert len(hives.hive.started) == 2  # one for each model
        jobs.cancel(*waiting, other)


async def test_a_load_that_failed_twice_is_not_tried_again_at_once(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_jobs() as (jobs, hives):
        for worker in ("worker-1", "worker-2"):
            waiting = [jobs.start(REQUEST) for _ in range(5)]
            await wait_all_tasks_blocked()
            hives.put(worker, "failed", error=ErrorDetail("machine", "boom"))
            for job in waiting:
                assert (await read(job))[-1].message == "boom"
        again = jobs.start(REQUEST)
        assert await refusal_of(again) == "machine"
        assert str(again.refusal).startswith("boom\n")
        assert len(hives.hive.started) == 2
        await trio.sleep(1.1)
        last = jobs.start(REQUEST)
        await wait_all_tasks_blocked()
        assert len(hives.hive.started) == 3
        jobs.cancel(last)
