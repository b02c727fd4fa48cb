"""``/v2/tasks`` at the queen's port, with a worker on loopback behind it."""

from __future__ import annotations

import gc
import json
import socket
import weakref
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from rbee.errors import GoneError
from rbee.queen.jobs import Jobs
from rbee.queen.limits import Limits
from rbee.queen.shelf import KEPT
from rbee.queen.tasks import prefers_async
from rbee.web.router import Request
from rbee.wire import sse
from rbee.wire.messages import End, Error, Queued, Started, TaskRequest, Token
from tests.queen.test_jobs import REQUEST, open_jobs
from tests.queen.test_openai import TOKEN, FakeWorker, Queen, brief, open_queen, stream, wait_for

__all__ = ["brief"]

PATH = "/v2/tasks"
ASYNC = {"prefer": "respond-async"}
ASK = {"model": "words", "prompt": "hi", "engine": "echo"}
STARTED = sse.encode(Started("job-1", "worker-0", "localhost", "words"))
ONE, TWO = sse.encode_token("one", 1), sse.encode_token(" two", 2)
END = sse.encode(End(1, 2, "stop", 1.0, 2.0))
WHOLE = [stream(STARTED, ONE, TWO, END)]
HELD = [stream(STARTED, ONE, ends=False)]


def events_of(text: str) -> list[Any]:
    return [sse.event_from(*pair) for pair in sse.Decoder().feed(text.encode())]


def ids_of(text: str) -> list[int]:
    return [int(line[4:]) for line in text.splitlines() if line.startswith("id: ")]


@asynccontextmanager
async def open_client(queen: Queen, **options: Any) -> AsyncGenerator[httpx.AsyncClient, None]:
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(
        base_url=queen.url, trust_env=False, headers=headers, timeout=5, **options
    ) as client:
        yield client


async def enqueue(client: httpx.AsyncClient, **more: Any) -> str:
    answer = await client.post(PATH, json={**ASK, **more}, headers=ASYNC)
    assert answer.status_code == 202
    return str(answer.json()["job_id"])


# attached -------------------------------------------------------------------------------------
@pytest.mark.parametrize("http2", [False, True])
async def test_the_workers_events_follow_the_queens_byte_for_byte(http2: bool) -> None:
    worker = FakeWorker(WHOLE)
    async with (
        open_queen(worker) as queen,
        open_client(queen, http2=http2, http1=not http2) as client,
    ):
        for _ in range(2):  # on one connection
            answer = await client.post(PATH, json={**ASK, "priority": -2})
            job_id = answer.headers["x-rbee-job-id"]
            queued = sse.encode(Queued(job_id, 0))
            assert answer.content == queued + STARTED + ONE + TWO + END
            assert answer.headers["x-accel-buffering"] == "no"
            assert answer.headers["content-type"] == "text/event-stream"
            sent = json.loads(worker.bodies[-1])
            assert (sent["job_id"], sent["prompt"], sent["priority"]) == (job_id, "hi", -2)
            assert worker.heads[-1].startswith(b"POST /execute HTTP/1.1\r\n")
            assert (await client.get(f"{PATH}/{job_id}")).status_code == 410
        assert not queen.jobs._assignments.room.slots.total()


async def test_a_job_that_runs_can_be_looked_at_and_cancelled() -> None:
    worker = FakeWorker(HELD)
    async with open_queen(worker) as queen, open_client(queen) as client:
        async with client.stream("POST", PATH, json={**ASK, "priority": 3}) as answer:
            job_id = answer.headers["x-rbee-job-id"]
            await wait_for(lambda: bool(queen.jobs.get(job_id).started))
            (info,) = (await client.get(PATH)).json()
            assert info == (await client.get(f"{PATH}/{job_id}")).json()
            assert (info["state"], info["attached"], info["priority"]) == ("started", True, 3)
            assert (info["model"], info["worker_id"]) == ("words", "worker-0")
            refused = await client.get(f"{PATH}/{job_id}/events")
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "attached")
            for _ in range(2):
                assert (await client.delete(f"{PATH}/{job_id}")).status_code == 204
            with trio.fail_after(0.3):
                await worker.left.wait()
            events = events_of((await answer.aread()).decode())
        assert [type(event) for event in events] == [Queued, Started, Token, Error]
        assert events[-1].code == "cancelled"


@pytest.mark.parametrize("answers", [[b""], HELD])
async def test_a_client_that_leaves_frees_the_worker(answers: list[bytes]) -> None:
    worker = FakeWorker(answers)
    async with open_queen(worker) as queen:
        with trio.move_on_after(5) as leaving:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(queen.post, PATH, json=ASK))
                await worker.asked.wait()
                leaving.cancel()
        with trio.fail_after(0.3):
            await worker.left.wait()
        assert len(queen.jobs) == 0


async def test_what_is_refused_at_once_is_a_plain_refusal() -> None:
    async with open_queen(limits=Limits(waiting_per_model=0)) as queen:
        for headers in ({}, ASYNC):
            full = await queen.post(PATH, json=ASK, headers=headers)
            assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
            assert full.headers["retry-after"] == "1"
            for wrong in ({"deadline": 0}, {"priority": 1 << 63}):
                bad = await queen.post(PATH, json={**ASK, **wrong}, headers=headers)
                assert bad.status_code == 400
        queen.stop.cancel()
        await wait_for(lambda: not queen.jobs.takes_tasks)
        assert (await queen.post(PATH, json=ASK)).status_code == 503
        assert (await queen.post(PATH, json=ASK, headers=ASYNC)).status_code == 503


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("cut", [10, len(STARTED), len(STARTED + ONE), len(STARTED + ONE) + 9])
async def test_a_worker_that_breaks_off_is_one_error_behind_whole_events(
    cut: int, ends: bool
) -> None:
    """Whether it dies, or ends its answer as if all were well."""
    worker = FakeWorker([stream((STARTED + ONE)[:cut], END[: cut - 90], ends=ends)], dies=not ends)
    async with open_queen(worker) as queen:
        text = (await queen.post(PATH, json=ASK)).text
    assert text.count("event: error\n") == 1
    events = events_of(text)
    assert (type(events[0]), events[-1].code) == (Queued, "worker_died")
    assert len(events) == 2 + (STARTED + ONE)[:cut].count(b"\n\n")


async def test_a_last_chunk_that_is_missing_is_not_missed() -> None:
    worker = FakeWorker([stream(STARTED, END, ends=False)], dies=True)
    async with open_queen(worker) as queen:
        text = (await queen.post(PATH, json=ASK)).text
    assert [type(event) for event in events_of(text)] == [Queued, Started, End]


async def test_what_a_slow_reader_has_not_taken_comes_before_the_last_event() -> None:
    many = [sse.encode_token("x" * 1000, number) for number in range(5000)]
    worker = FakeWorker([stream(STARTED, *many, ends=False)])
    async with open_queen(worker) as queen:
        body = json.dumps({**ASK, "deadline": 0.5}).encode()
        head = (
            b"POST /v2/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        sock = trio.socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await sock.connect(("127.0.0.1", int(queen.url.rpartition(":")[2])))
        async with trio.SocketStream(sock) as client:
            await client.send_all(head + body)
            await worker.asked.wait()
            await wait_for(lambda: not len(queen.jobs))
            data = b""
            while part := await client.receive_some():
                data += part
    assert data.endswith(b"\r\n0\r\n\r\n")
    assert data.count(b"\n0\r\n\r\n") == 1
    assert data.count(b"event: error\n") == 1
    assert b'"code":"deadline"' in data[-400:]


# kept -----------------------------------------------------------------------------------------
async def test_a_job_is_accepted_and_read_and_told_of_later() -> None:
    worker = FakeWorker(WHOLE)
    async with open_queen(worker) as queen, open_client(queen) as client:
        answer = await client.post(PATH, json=ASK, headers={"prefer": "wait=5, Respond-Async"})
        job_id = answer.json()["job_id"]
        place = f"{PATH}/{job_id}"
        assert answer.status_code == 202
        assert answer.json() == {"job_id": job_id, "events_url": place + "/events"}
        assert answer.headers["location"] == place
        assert answer.headers["preference-applied"] == "respond-async"
        text = (await client.get(place + "/events")).text
        assert events_of(text) == [
            Queued(job_id, 0), Started("job-1", "worker-0", "localhost", "words"),
            Token("one", 1), Token(" two", 2), End(1, 2, "stop", 1.0, 2.0),
        ]  # fmt: skip
        assert ids_of(text) == [1, 2, 3, 4, 5]
        info = (await client.get(place)).json()
        assert (info["state"], info["attached"], info["position"]) == ("ended", False, 0)
        assert (info["tokens_in"], info["tokens_out"], info["stop_reason"]) == (1, 2, "stop")
        assert (info["first_event"], info["last_event"]) == (1, 5)
        assert 0 < info["created"] <= info["started"] <= info["ended"]
        assert [one["job_id"] for one in (await client.get(PATH)).json()] == [job_id]
        for seen in range(6):
            rest = await client.get(place + "/events", headers={"last-event-id": str(seen)})
            assert rest.status_code == (200 if seen < 5 else 204)
            assert ids_of(rest.text) == list(range(seen + 1, 6))
        for wrong in ("6", "x", "-1"):
            refused = await client.get(place + "/events", headers={"last-event-id": wrong})
            assert refused.status_code == 400
        for unknown in (f"{PATH}/job-0", f"{PATH}/job-0/events"):
            assert (await client.get(unknown)).status_code == 404
        assert (await client.delete(f"{PATH}/job-0")).status_code == 204


async def test_readers_come_and_go_and_the_job_goes_on_until_it_is_cancelled() -> None:
    worker = FakeWorker(HELD)
    async with open_queen(worker) as queen, open_client(queen) as client:
        job_id = await enqueue(client)
        texts: list[str] = []

        async def read(last_seen: str) -> None:
            headers = {"last-event-id": last_seen}
            texts.append((await client.get(f"{PATH}/{job_id}/events", headers=headers)).text)

        async with client.stream("GET", f"{PATH}/{job_id}/events") as answer:
            assert b"queued" in await anext(answer.aiter_raw())
        assert len(queen.jobs) == 1  # that one has left
        async with trio.open_nursery() as nursery:
            for last_seen in ("0", "0", "2", "3"):
                nursery.start_soon(read, last_seen)
            await wait_for(lambda: queen.jobs.get(job_id).info().last_event == 3)
            info = (await client.get(f"{PATH}/{job_id}")).json()
            assert (info["state"], info["tokens_out"]) == ("started", 1)
            for _ in range(2):
                assert (await client.delete(f"{PATH}/{job_id}")).status_code == 204
            with trio.fail_after(0.3):
                await worker.left.wait()
        assert [len(ids_of(text)) for text in sorted(texts)].count(4) == 2
        for text in texts:
            assert events_of(text)[-1].code == "cancelled"
            assert text.count("event: error\n") == 1
        assert (await client.get(f"{PATH}/{job_id}")).json()["state"] == "cancelled"


async def test_a_deadline_and_the_queens_end_are_told_to_each_reader() -> None:
    async with open_queen(FakeWorker(HELD)) as queen, open_client(queen) as client:
        late = await enqueue(client, deadline=0.1)
        assert events_of((await client.get(f"{PATH}/{late}/events")).text)[-1].code == "deadline"
        job_id = await enqueue(client)
        texts: list[str] = []

        async def read() -> None:
            texts.append((await client.get(f"{PATH}/{job_id}/events")).text)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read)
            await wait_for(lambda: queen.jobs.get(job_id).info().last_event == 3)
            await trio.sleep(0.05)
            queen.stop.cancel()
        for text in texts:
            assert [type(event) for event in events_of(text)] == [Queued, Started, Token, Error]
            assert events_of(text)[-1].code == "owner_gone"


async def test_a_slow_reader_delays_nobody_and_is_told_what_he_missed() -> None:
    many = [sse.encode_token("x" * 1000, number) for number in range(20_000)]
    worker = FakeWorker([stream(STARTED, *many, END)])
    async with open_queen(worker) as queen, open_client(queen) as client:
        job_id = await enqueue(client)
        async with client.stream("GET", f"{PATH}/{job_id}/events") as slow:
            await wait_for(lambda: bool(queen.jobs.get(job_id).ended))
            assert queen.jobs.shelf.size < 1.1 * (1 << 20)
            text = (await slow.aread()).decode()
        *_, last = events_of(text)
        assert last.code == "events_gone"
        seen = ids_of(text)[-1]
        assert ids_of(text) == list(range(1, seen + 1))
        again = {"last-event-id": str(seen)}
        gone = await client.get(f"{PATH}/{job_id}/events", headers=again)
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "events_gone")
        rest = {"last-event-id": str(gone.json()["error"]["details"]["first"] - 1)}
        text = (await client.get(f"{PATH}/{job_id}/events", headers=rest)).text
        assert type(events_of(text)[-1]) is End


async def test_a_job_is_kept_for_a_while_after_its_end(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_jobs() as (started, _):
        jobs: Jobs = started.jobs
        job = jobs.accept(TaskRequest("words", prompt="hi", engine="echo", deadline=5))
        await jobs.keep(job, 100)
        await trio.sleep(5 + KEPT - 1)
        assert jobs.get(job.id).info().state == "failed"
        assert job.request.prompt is None
        await trio.sleep(2)
        with pytest.raises(GoneError):
            jobs.get(job.id)
        assert (len(jobs.shelf), jobs.shelf.size) == (0, 0)


async def test_a_bug_in_a_kept_job_ends_that_job_only(
    monkeypatch: pytest.MonkeyPatch, error_records: list[Any]
) -> None:
    async with open_jobs() as (started, _):
        jobs: Jobs = started.jobs
        job = jobs.accept(REQUEST)
        with monkeypatch.context() as patch:

            async def fail(*_: object) -> None:
                await trio.sleep(0.05)
                raise ZeroDivisionError

            patch.setattr(Jobs, "_place_and_relay", fail)
            await jobs.keep(job, 100)
            assert job.log is not None
            with trio.fail_after(1):
                await job.log.wait(2)
        assert b"internal error" in job.log.after(1)[0]
        assert len(error_records) == 1
        error_records.clear()


@given(st.lists(st.sampled_from(["wait=10", "return=minimal", "x; respond-async", ""])))
def test_the_preference_is_found_among_others(others: list[str]) -> None:
    def asked(*wishes: str) -> bool:
        header = ",".join(wishes).encode()
        return prefers_async(Request("POST", PATH, {}, {b"prefer": header}, trio.sleep_forever))

    assert not asked(*others)
    assert asked(*others, "respond-async")
    assert asked(" Respond-Async ;x=1", *others)


# of others ------------------------------------------------------------------------------------
async def test_a_key_sees_and_ends_jobs_of_its_own_only(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        "".join(
            f'[keys.{name}]\nsha256 = "{sha256(name.encode()).hexdigest()}"\n'
            'requests_at_once = 1\nmodels = ["words"]\n'
            for name in ("bee", "wasp")
        )
    )
    bee, wasp = ({"authorization": f"Bearer {name}"} for name in ("bee", "wasp"))
    async with open_queen(FakeWorker(HELD), config=config) as queen, open_client(queen) as client:
        refused = await client.post(PATH, json={**ASK, "model": "other"}, headers=bee)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
        job_id = (await client.post(PATH, json=ASK, headers=bee | ASYNC)).json()["job_id"]
        full = await client.post(PATH, json=ASK, headers=bee)  # a job that is kept counts
        assert (full.status_code, full.json()["error"]["code"]) == (429, "rate_limited")
        for path in (f"{PATH}/{job_id}", f"{PATH}/{job_id}/events"):
            assert (await client.get(path, headers=wasp)).status_code == 404
        assert (await client.delete(f"{PATH}/{job_id}", headers=wasp)).status_code == 204
        assert (await client.get(PATH, headers=wasp)).json() == []
        for headers in (bee, {}):
            (info,) = (await client.get(PATH, headers=headers)).json()
            assert info["state"] != "cancelled"
        assert (await client.delete(f"{PATH}/{job_id}", headers=bee)).status_code == 204
        await wait_for(lambda: not len(queen.jobs))
        assert (await client.get(f"{PATH}/{job_id}", headers=bee)).json()["state"] == "cancelled"


@pytest.mark.parametrize(
    "given",
    [
        {"hub": {"endpoint": "http://127.0.0.1:9"}}, {"engine_args": {"seed": "1"}},
        {"keep_alive": -1}, {"node": "localhost"}, {"max_model_len": 64},
    ],
)  # fmt: skip
async def test_how_a_worker_is_started_is_not_for_a_key_to_say(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[keys.bee]\nsha256 = "{sha256(b"bee").hexdigest()}"\n')
    bee = {"authorization": "Bearer bee"}
    async with open_queen(FakeWorker(WHOLE), config=config) as queen, open_client(queen) as client:
        refused = await client.post(PATH, json=ASK | given, headers=bee)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (403, "option_not_allowed")
        assert f"may not set {next(iter(given))}" in error["message"]


async def test_a_model_whose_name_is_too_long_is_refused() -> None:
    async with open_queen(FakeWorker(WHOLE)) as queen, open_client(queen) as client:
        refused = await client.post(PATH, json=ASK | {"model": "m" * 4097})
        assert (refused.status_code, "too long" in refused.text) == (400, True)


async def test_of_a_job_that_has_ended_little_of_the_request_is_kept() -> None:
    long = {"stop": ["x" * 9], "priority": 3, "deadline": 60}
    async with open_queen(FakeWorker(WHOLE)) as queen, open_client(queen) as client:
        await client.post(PATH, json=ASK | long, headers=ASYNC)
        await wait_for(lambda: not len(queen.jobs))
        (job,) = queen.jobs
        assert job.request == TaskRequest(ASK["model"], priority=3, deadline=60)


async def test_what_the_shelf_has_no_room_for_is_nowhere_else() -> None:
    async with open_queen(FakeWorker(WHOLE)) as queen, open_client(queen) as client:
        await client.post(PATH, json=ASK, headers=ASYNC)
        await wait_for(lambda: not len(queen.jobs))
        (job,) = queen.jobs.shelf
        log = weakref.ref(job.log)
        queen.jobs.shelf.forget(job.id)
        del job
        await wait_all_tasks_blocked()
        gc.collect()
        assert log() is None


async def test_a_job_that_waits_tells_how_many_are_before_it() -> None:
    worker = FakeWorker([*HELD, *WHOLE])
    async with open_queen(worker, slots=1) as queen, open_client(queen) as client:
        jobs = [await enqueue(client) for _ in range(3)]
        await worker.asked.wait()
        positions = [info["position"] for info in (await client.get(PATH)).json()]
        assert positions == [0, 0, 1]
        for job_id in jobs[:2]:
            await client.delete(f"{PATH}/{job_id}")
        events = events_of((await client.get(f"{PATH}/{jobs[2]}/events")).text)
        assert events[:2] == [Queued(jobs[2], 0), Queued(jobs[2], 1)]
        assert type(events[-1]) is End
