"""A queen's hives: heard of, silent, stopped when asked."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from rbee import __version__, guard
from rbee.errors import ConflictError, MachineError, NotFoundError, PeerError
from rbee.home import Home, write_atomic
from rbee.model import WorkerId
from rbee.queen.hive import ENDS, SILENT, Hive
from rbee.queen.hives import Hives, _Started
from rbee.queen.machine import QueenSetup
from rbee.queen.machines import Machines
from rbee.remains import stuck
from rbee.web.client import open_client
from rbee.web.listener import open_listener
from rbee.web.router import App, Emit, Request, Response, Stream, json_response
from rbee.web.server import serve_http
from rbee.wire import codec, messages, sse
from rbee.wire.messages import Heartbeat, HiveInfo, WorkerInfo, WorkerNarration, WorkerReady
from tests.journal import planted, process, write
from tests.unkillable import unkillable

INFO = HiveInfo("localhost", "hive-1", "http://127.0.0.1:9200", "ready", "queen-1", 7, "0")
WORKER = WorkerInfo("worker-1", "words", "ready", owner="queen-1")
OTHERS = attrs.evolve(WORKER, worker_id="worker-2", owner="queen-2")
BEAT = Heartbeat("hive-1", 100, 60, 30, (attrs.evolve(WORKER, running=2, idle=0.0), OTHERS))


def make_hives(home: Home) -> Hives:
    setup = QueenSetup("queen-1", home, home.run / "q1", "secret", "nonce")
    return Hives(setup, Machines(setup))


# hearing ------------------------------------------------------------------------------------------
async def test_a_hive_that_falls_silent_is_unresponsive_until_it_is_heard_again(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_client() as client, trio.open_nursery() as nursery:
        hive = Hive(INFO, True, "secret", client)
        states: list[tuple[float, str]] = []
        nursery.start_soon(hive.keep_watching)
        for second in range(31):
            if second <= 10 or second >= 28:
                hive.heard = trio.current_time()
            await trio.sleep(1)
            if not states or states[-1][1] != hive.info.state:
                states.append((second + 1, hive.info.state))
        nursery.cancel_scope.cancel()
    (_, first), (silent, second_state), (_, last) = states
    assert [first, second_state, last] == ["ready", "unresponsive", "ready"]
    assert SILENT <= silent - 10 < 15


async def test_a_heartbeat_tells_how_a_hive_and_its_workers_stand(home: Home) -> None:
    hives = make_hives(home)
    hives.take_info(WORKER)
    async with open_client() as client:
        hive = Hive(INFO, True, "secret", client, heard=trio.current_time() - 100)
        await hives._take(hive, "heartbeat", codec.dumps(BEAT).decode())
        told = hive.told()
    assert (told.memory_total, told.memory_free, told.disk_free) == (100, 60, 30)
    assert told.workers == 2
    assert told.last_seen < 50
    assert list(hives.workers) == [BEAT.workers[0]]


@pytest.mark.parametrize(
    ("news", "known"),
    [({}, ("ready", 9)), ({"state": "ready", "pid": 9, "running": 3}, ("ready", 9)),
     ({"state": "failed"}, None), ({"state": "stopping"}, ("stopping", 8))],
)  # fmt: skip
async def test_a_worker_is_ready_unless_its_hive_has_told_more_meanwhile(
    home: Home, news: dict[str, Any], known: tuple[str, int] | None
) -> None:
    hives = make_hives(home)
    loading = attrs.evolve(WORKER, state="loading", pid=8)
    hives.take_info(loading)

    async def via(url: str) -> str:  # meanwhile
        hives.take_info(attrs.evolve(loading, **news))
        return url

    told = WorkerReady(WORKER.worker_id, "http://127.0.0.1:1", "words", "cpu", "0", 4, pid=9)
    async with open_client() as client:
        await hives.take_ready(Hive(INFO, True, "secret", client, via=via), told)
    info = hives.workers.get(WorkerId(WORKER.worker_id))
    assert (info and (info.state, info.pid)) == known
    assert info is None or info.running == news.get("running", 0)


@pytest.mark.parametrize("state", ["ready", "stopping"])
async def test_older_news_does_not_make_a_worker_load_again(home: Home, state: str) -> None:
    hives = make_hives(home)
    known = attrs.evolve(WORKER, state=state, pid=9)
    hives.take_info(known)
    loading = attrs.evolve(WORKER, state="loading", pid=8)
    told = WorkerNarration(WORKER.worker_id, "worker", "load", "weights", 0.5)
    async with open_client() as client:
        hive = Hive(INFO, True, "secret", client)
        await hives._take(hive, "workerinfo", codec.dumps(loading).decode())
        await hives._take(hive, "workernarration", codec.dumps(told).decode())
    assert list(hives.workers) == [known]


async def test_whether_a_hive_ends_is_known_when_it_is_gone_or_after_a_while(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_client() as client:
        hive = Hive(INFO, True, "secret", client)
        began = trio.current_time()
        assert not await hive.ends()
        assert trio.current_time() - began == ENDS
        hive.note_gone()
        assert await hive.ends()


# an operator's hive -------------------------------------------------------------------------------
@asynccontextmanager
async def open_operators_hive(
    home: Home, frozen: trio.Event | None = None
) -> AsyncGenerator[set[str]]:
    """Serve a small hive that an operator has started; yields the queens with a lease.

    Once ``frozen`` is set it takes calls and answers none.
    """
    owners: set[str] = set()

    async def health(_: Request) -> Response:
        return json_response(
            messages.Health("hive", "hive-1", __version__, "operator", str(home.root), os.getpid())
        )

    async def renew(request: Request) -> Response:
        if frozen is not None and frozen.is_set():
            await trio.sleep_forever()
        owners.add(request.params["queen"])
        return Response(status=204)

    async def end(request: Request) -> Response:
        owners.discard(request.params["queen"])
        return Response(status=204)

    async def news(_: Request) -> Stream:
        async def run(emit: Emit) -> None:
            await emit(sse.encode(messages.WorkerIds(())))
            await trio.sleep_forever()

        return Stream(run)

    app = App(token="secret")
    app.add("GET", messages.HEALTH, health, is_open=True)
    app.add("GET", messages.HIVE_WORKERS, news)
    app.add("PUT", messages.HIVE_OWNERS + "/{queen}", renew)
    app.add("DELETE", messages.HIVE_OWNERS + "/{queen}", end)
    async with trio.open_nursery() as nursery:
        listener = open_listener("127.0.0.1", 0, exact=True)
        url = await nursery.start(partial(serve_http, app, listener, grace=0.1))
        pid = os.getpid()
        record = messages.RunFile(
            "hive", "hive-1", url, pid, guard.start_time(pid), guard.boot_id(), __version__,
            "operator", str(home.token_file),
        )  # fmt: skip
        write_atomic(home.token_file, "secret\n")
        write_atomic(home.hive_file, codec.dumps(record).decode())
        yield owners
        nursery.cancel_scope.cancel()


async def test_an_operators_hive_is_used_and_not_ended(home: Home) -> None:
    hives = make_hives(home)
    async with open_operators_hive(home) as owners, hives.open():
        with pytest.raises(ConflictError, match=f"pid {os.getpid()}") as caught:
            await hives.stop("localhost")  # not even used so far
        hive = await hives.get("localhost", lambda narration: None)
        assert (hive.owned, owners) == (False, {"queen-1"})
        with pytest.raises(ConflictError, match="not this queen's to end"):
            await hives.stop("localhost")
        assert [info.hive_id for info in hives.infos()] == ["hive-1"]
    assert caught.value.hint.startswith(f"kill {os.getpid()} ")
    assert caught.value.code == "not_owned"


async def test_an_operators_hive_that_is_frozen_is_not_lost(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rbee.queen.hives.RENEW", 0.05)
    setup = QueenSetup("queen-1", home, home.run / "q1", "secret", "nonce", lease=0.3)
    hives, frozen = Hives(setup, Machines(setup)), trio.Event()
    async with open_operators_hive(home, frozen) as owners:
        async with hives.open():
            hive = await hives.get("localhost", lambda narration: None)
            frozen.set()
            await trio.sleep(0.8)  # more than one renewal without an answer
            assert not hive.gone.is_set()
            assert hives.running("localhost") is hive
            assert owners == {"queen-1"}  # no goodbye, which would end its workers when it thaws
        assert owners == set()


# reaching -----------------------------------------------------------------------------------------
def lost() -> ExceptionGroup[Exception]:
    return ExceptionGroup("as a nursery raises it", [PeerError("lost", code="connection_lost")])


@pytest.mark.parametrize(
    ("errors", "is_reached", "tries"),
    [
        ([lost()], True, 2),
        ([lost(), lost()], False, 2),
        ([], True, 1),
        ([PeerError("no address", code="unreachable")], False, 1),
    ],
)
async def test_a_node_that_is_lost_before_its_hive_is_usable_is_reached_once_more(
    home: Home, monkeypatch: pytest.MonkeyPatch, errors: list[Exception], is_reached: bool,
    tries: int,
) -> None:  # fmt: skip
    tried: list[str] = []

    async def reach(self: Hives, node: str, narrate: object, status: Any) -> None:
        tried.append(node)
        if errors:
            raise errors.pop(0)
        async with open_client() as client:
            hive = self._hives[node] = Hive(INFO, True, "secret", client, status.scope)
            status.started(hive)
            raise lost()  # later: it was in use, and whoever used it is told

    monkeypatch.setattr(Hives, "_reach", reach)
    hives = make_hives(home)
    async with hives.open():
        with nullcontext() if is_reached else pytest.raises(PeerError):
            await hives.get("localhost", lambda narration: None)
        await trio.testing.wait_all_tasks_blocked()
    assert len(tried) == tries
    assert hives.infos() == []


# stopping -----------------------------------------------------------------------------------------
async def test_a_hive_is_stopped_with_its_workers_and_started_anew(
    home: Home, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    seen: list[object] = []

    async def run(self: Hives, node: str, narrate: object, status: Any) -> None:
        async with open_client() as client:
            hive = Hive(attrs.evolve(INFO, node=node), True, "secret", client, status.scope)
            self._hives[node] = hive
            self.take_info(WORKER)
            status.started(hive)
            try:
                await trio.sleep_forever()
            finally:
                seen.extend((hive.info.state, [info.state for info in self.workers]))
                with trio.CancelScope(shield=True):
                    await trio.sleep(3)  # what its guards take

    monkeypatch.setattr(Hives, "_run", run)
    hives = make_hives(home)
    async with hives.open():
        await hives.stop("localhost")  # none runs: fine
        first = await hives.get("localhost", lambda narration: None)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hives.stop, "localhost")
            await trio.testing.wait_all_tasks_blocked()
            second = await hives.get("localhost", lambda narration: None)  # waits for the end
        assert trio.current_time() - began == pytest.approx(3)
        assert seen[:2] == ["stopping", ["stopping"]]
        assert first is not second
        assert first.gone.is_set()
        failure = hives.failures["worker-1"].error
        assert failure is not None
        assert "the hive on localhost is gone: it was stopped" in failure.message
        with pytest.raises(NotFoundError, match="no node 'mars'"):
            await hives.stop("mars")


# what does not end --------------------------------------------------------------------------------
@pytest.mark.slow
async def test_a_hive_of_which_something_is_left_is_told_until_it_has_gone(home: Home) -> None:
    hives = make_hives(home)
    run_dir = home.run / "q1" / "h1"
    run_dir.mkdir(parents=True)
    async with hives.open(), open_client() as client, trio.open_nursery() as nursery:
        hive = hives._hives["localhost"] = Hive(INFO, True, "secret", client)

        async def live(error: MachineError) -> None:
            with hive.scope:
                await trio.sleep_forever()
            hives._note_left("localhost", error, _Started(trio.TASK_STATUS_IGNORED, run_dir="h1"))
            hives._lose("localhost", error)

        with planted() as child, unkillable(child):
            write(run_dir, child=process(child))
            nursery.start_soon(live, stuck("h1", [(child, guard.start_time(child))]))
            with pytest.raises(MachineError, match="does not end"):
                await hives.stop("localhost")
            (info,) = hives.infos()
            assert (info.state, info.left[:22]) == ("stuck", "a process of h1 does n")
        with trio.fail_after(10):
            while hives.infos():  # noqa: ASYNC110  # a process gives no event
                await trio.sleep(0.05)
    assert not run_dir.exists()
