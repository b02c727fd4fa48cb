"""A worker's lifetime: load, canary, ready callback, work, end."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import trio

from rbee import guard
from rbee.errors import (
    ChildExitedError,
    MachineError,
    NotFoundError,
    PeerError,
    UnavailableError,
    leaves,
)
from rbee.web.client import open_client, open_events
from rbee.web.listener import open_listener
from rbee.web.router import App, Response
from rbee.web.server import serve_http
from rbee.wire.messages import WorkerNarration, WorkerReady
from rbee.worker import daemon
from rbee.worker.app import Worker, make_app
from rbee.worker.daemon import serve

from .conftest import TOKEN, make_config


def engine_pids():
    pids = guard.children(os.getpid())
    return [p for p in pids if b"echo-engine" in Path(f"/proc/{p}/cmdline").read_bytes()]


async def test_while_loading_it_answers_503_with_its_state(tmp_path, monkeypatch):
    urls, listening = [], trio.Event()

    def note(text, *args):
        urls.extend(args[1:2])
        listening.set()

    monkeypatch.setattr(daemon.log, "info", note)
    config = make_config(tmp_path, load="60")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, config)
            await listening.wait()
            async with open_client(urls[0], TOKEN) as client:
                ready = await client.get("/v1/ready")
                assert ready.status_code == 503
                assert ready.json()["state"] == "loading"
                assert ready.json()["progress"] == "weights"
                assert 0 <= ready.json()["share"] < 0.5
                for path in ("/execute", "/v1/chat/completions"):
                    refused = await client.post(path, json={"job_id": "j", "prompt": "x"})
                    assert refused.status_code == 503
                    assert refused.headers["retry-after"] == "1"
                    assert refused.json()["error"]["code"] == "starting"
                # Asked to stop while it loads, it stops.
                assert (await client.post("/v1/admin/shutdown")).status_code == 202
    assert engine_pids() == []


async def test_shutdown_is_acknowledged_and_every_stream_gets_its_terminal_event(tmp_path):
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            url = await nursery.start(serve, make_config(tmp_path))
            async with open_client(url, TOKEN) as client:
                body = {"job_id": "j", "prompt": "x", "max_tokens": 1000}
                async with open_events(client, "POST", "/execute", body, what="w") as stream:
                    await anext(stream)
                    assert (await client.post("/v1/admin/shutdown")).status_code == 202
                    events = [event async for event in stream]
    assert [name for name, _ in events].count("error") == 1
    assert json.loads(events[-1][1])["code"] == "worker_stopping"
    assert engine_pids() == []


async def test_cancelling_ends_it_within_its_grace_and_frees_the_engine(open_worker):
    async with open_worker() as worker, worker.stream(max_tokens=1000) as stream:
        await anext(stream)
        start = trio.current_time()
        worker.scope.cancel()
        with trio.CancelScope(shield=True):
            events = [event async for event in stream]
    assert trio.current_time() - start < 2
    assert json.loads(events[-1][1])["code"] == "worker_stopping"
    assert engine_pids() == []


async def test_the_engines_death_ends_streams_and_worker_within_a_second(tmp_path, error_records):
    with trio.fail_after(10), pytest.RaisesGroup(ChildExitedError, flatten_subgroups=True) as info:
        async with trio.open_nursery() as nursery:
            url = await nursery.start(serve, make_config(tmp_path))
            async with open_client(url, TOKEN) as client:
                body = {"job_id": "j", "prompt": "x", "max_tokens": 1000}
                async with open_events(client, "POST", "/execute", body, what="w") as stream:
                    await anext(stream)
                    (pid,) = engine_pids()
                    os.kill(pid, signal.SIGKILL)
                    killed = trio.current_time()
                    with trio.CancelScope(shield=True):
                        events = [event async for event in stream]
                    assert trio.current_time() - killed < 1
    assert [name for name, _ in events].count("error") == 1
    assert json.loads(events[-1][1])["code"] == "engine_died"
    (error,) = leaves(info.value)
    assert error.code == "engine_died"
    assert "SIGKILL" in str(error)
    error_records.clear()


@pytest.mark.parametrize(("fail", "error"), [("load", MachineError), ("canary", ChildExitedError)])
async def test_a_worker_that_cannot_generate_never_becomes_ready(
    tmp_path, fail, error, error_records
):
    with trio.fail_after(10):
        with pytest.raises(BaseExceptionGroup) as info:
            await serve(make_config(tmp_path, fail=fail))
        assert info.group_contains(error)
    assert engine_pids() == []
    error_records.clear()


async def test_an_engine_that_dies_at_its_first_token_is_told_by_who_watches_it(
    tmp_path, autojump_clock
):
    class Dying:
        def generate(self, request):
            raise PeerError("the engine process has died", code="engine_died")

    with trio.move_on_after(daemon.CANARY_LIMIT / 2) as scope:
        await daemon.generate_canary(Dying(), make_config(tmp_path))
    assert scope.cancelled_caught  # its own words say less than the watcher's


def hive_app(answers, got, progress=None):
    async def ready(request):
        got.append(await request.read(WorkerReady))
        return Response(status=answers.pop(0))

    async def take_progress(request):
        progress.append(await request.read(WorkerNarration))
        return Response(status=204 if len(progress) > 1 else 500)

    app = App(token=TOKEN)
    app.add("POST", "/v1/workers/ready", ready)
    app.add("POST", "/v1/workers/progress", take_progress)
    return app


async def test_the_ready_callback_is_retried_until_the_hive_takes_it(tmp_path):
    got = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            http = partial(serve_http, hive_app([503, 502, 204], got), grace=0.1)
            hive = await nursery.start(http, open_listener("127.0.0.1", 0, exact=True))
            url = await nursery.start(serve, make_config(tmp_path, hive_url=hive))
            nursery.cancel_scope.cancel()
    assert got == [WorkerReady("worker-1", url, "echo-model", "cpu", "0", slots=256)] * 3


async def test_a_loading_worker_tells_its_hive_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "TELL_EVERY", 0.05)
    got, progress = [], []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            http = partial(serve_http, hive_app([204], got, progress), grace=0.1)
            hive = await nursery.start(http, open_listener("127.0.0.1", 0, exact=True))
            await nursery.start(serve, make_config(tmp_path, hive_url=hive, load="0.6"))
            nursery.cancel_scope.cancel()
    shares = [told.share for told in progress if told.text == "weights"]  # the canary has none
    assert len(shares) >= 3  # it goes on after the one that was refused
    assert sorted(set(shares)) == shares  # no word twice
    assert progress[0] == WorkerNarration("worker-1", "worker", "load", "weights", shares[0])


async def test_a_quick_start_is_not_slowed_by_telling_of_it(tmp_path):
    got, progress = [], []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            http = partial(serve_http, hive_app([204], got, progress), grace=0.1)
            hive = await nursery.start(http, open_listener("127.0.0.1", 0, exact=True))
            await nursery.start(serve, make_config(tmp_path, hive_url=hive))
            nursery.cancel_scope.cancel()
    assert (len(got), progress) == (1, [])


async def test_the_share_of_a_step_never_falls(tmp_path):
    worker = Worker(make_config(tmp_path))
    for share in (0.5, 0.4, 0.6):
        worker.report("weights", share)
    assert (worker.progress, worker.share) == ("weights", 0.6)
    worker.report("weights", 0.1)
    assert worker.share == 0.6
    worker.report("another", 0.1)
    assert worker.share == 0.1


async def test_a_worker_that_its_hive_does_not_know_ends(tmp_path):
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            http = partial(serve_http, hive_app([404], []), grace=0.1)
            hive = await nursery.start(http, open_listener("127.0.0.1", 0, exact=True))
            with pytest.raises(BaseExceptionGroup) as info:
                await serve(make_config(tmp_path, hive_url=hive))
            assert info.group_contains(NotFoundError)
            nursery.cancel_scope.cancel()


class AppEngine:
    """An engine whose own app answers slowly."""

    context = 8

    def __init__(self, app):
        self.app = app

    def running(self):
        return 0

    def metrics(self):
        return "their_figure 1\n"


async def test_the_engines_own_app_gets_every_other_route_and_ends_with_the_worker(tmp_path):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await trio.sleep_forever()

    worker = Worker(make_config(tmp_path))
    worker.begin(AppEngine(app))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            http = partial(serve_http, make_app(worker), grace=0.1)
            url = await nursery.start(http, open_listener("127.0.0.1", 0, exact=True))
            async with open_client(url, TOKEN) as client:
                assert (await client.get("/metrics")).text.startswith("their_figure 1\n")
                async with client.stream("POST", "/v1/chat/completions") as response:
                    assert await anext(response.aiter_raw()) == b"begun"
                    worker.end(worker.state, UnavailableError("stopping"))
                    await worker.jobs.wait_empty()
            nursery.cancel_scope.cancel()
