"""A job that belongs to nobody, through the SDK: in trio, in asyncio, and in neither."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import pytest
import trio

from rbee import AsyncClient, Client, job
from rbee.errors import (
    CancelledError,
    GoneError,
    NotFoundError,
    OwnerGoneError,
    PeerError,
    QueueFullError,
    RbeeError,
    UnavailableError,
)
from rbee.job import AsyncJob, JobEvents
from rbee.queen.limits import Limits
from rbee.wire.messages import End, Event, Queued, Started, Token
from tests.queen.test_openai import TOKEN, FakeWorker, Queen, open_queen, stream, wait_for
from tests.queen.test_tasks import END, HELD, ONE, STARTED, TWO, WHOLE

T = TypeVar("T")
KINDS = [Queued, Started, Token, Token, End]


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbee.queen.assignments.TOLD_WITHIN", 0.05)
    monkeypatch.setattr(job, "WAITS", (0.0, 0.05, 0.05))


async def beside(fn: Callable[..., T], *args: Any) -> T:
    """Call what blocks beside the queen."""
    with trio.fail_after(10):
        return await trio.to_thread.run_sync(fn, *args)


@asynccontextmanager
async def open_job(*answers: bytes) -> AsyncGenerator[tuple[Queen, AsyncJob], None]:
    async with open_queen(FakeWorker([*answers])) as queen:
        client = AsyncClient(queen.url, TOKEN)
        yield queen, await client.enqueue("words", "hi", engine="echo")


@asynccontextmanager
async def open_cutter(url: str, *cuts: int) -> AsyncGenerator[str, None]:
    """Forward to a queen; cut each answer after so many bytes, then refuse all connections."""
    port, left = int(url.rpartition(":")[2]), list(cuts)

    async def forward(client: trio.SocketStream) -> None:
        if not left:
            client.socket.close()
            return
        cut = left.pop(0)
        async with client, await trio.open_tcp_stream("127.0.0.1", port) as queen:
            await queen.send_all(await client.receive_some())
            with suppress(trio.BrokenResourceError):  # he has left
                while cut > 0 and (data := await queen.receive_some(cut)):
                    await client.send_all(data)
                    cut -= len(data)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, forward, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


async def kinds_of(events: JobEvents) -> list[type[Event]]:
    return [type(event) async for event in events]


async def test_a_job_is_enqueued_and_its_result_had_later() -> None:
    async with open_job(*WHOLE) as (queen, job):
        answer = await job.result()
        assert (answer.text, answer.job_id, answer.tokens_out) == ("one two", job.id, 2)
        assert await job.result() == answer
        async with job.events() as events:
            assert await kinds_of(events) == KINDS
            assert events.last_seen == 5
            assert events.answer == answer
        assert await kinds_of(job.events(last_seen=3)) == [Token, End]
        assert await kinds_of(job.events(last_seen=5)) == []
        info = await job.status()
        assert (info.state, info.tokens_out) == ("ended", 2)
        client = AsyncClient(queen.url, TOKEN)
        assert await client.jobs() == [info]
        assert await client.job(job.id).status() == info
        assert repr(job) == f"<AsyncJob {job.id}>"


async def test_leaving_its_events_leaves_a_job_as_it_is_and_cancelling_ends_it() -> None:
    async with open_job(*HELD) as (_, job):
        async with job.events() as events:
            assert type(await anext(events)) is Queued
        async for text in job.events().text():
            assert text == "one"
            break
        with trio.move_on_after(0.05):
            await job.result()
        assert (await job.status()).state == "started"
        await job.cancel()
        await job.cancel()
        with pytest.raises(CancelledError):
            await job.result()
        assert (await job.status()).state == "cancelled"


async def test_a_job_that_nobody_knows_or_that_is_not_kept_is_told() -> None:
    async with open_job(*WHOLE) as (queen, job):
        await job.result()
        queen.jobs.shelf.forget(queen.jobs.get(job.id).id)
        for ask in (job.status, job.result):
            with pytest.raises(GoneError, match="has ended and is not kept"):
                await ask()
        client = AsyncClient(queen.url, TOKEN)
        with pytest.raises(NotFoundError):
            await client.job("job-0/../x").result()
        await client.job("job-0").cancel()


async def test_what_is_refused_is_raised_by_enqueue() -> None:
    async with open_queen(limits=Limits(waiting_per_model=0)) as queen:
        with pytest.raises(QueueFullError):
            await AsyncClient(queen.url, TOKEN).enqueue("words", "hi")


async def test_the_jobs_own_error_is_raised_and_not_tried_again() -> None:
    async with open_queen(FakeWorker([stream(STARTED, ONE, ends=False)], dies=True)) as queen:
        job = await AsyncClient(queen.url, TOKEN).enqueue("words", "hi", engine="echo")
        with pytest.raises(RbeeError, match="ended in the middle") as caught:
            await job.result()
        assert caught.value.code == "worker_died"


@pytest.mark.parametrize("cuts", [(300, 300, 330, 9999), (0, 200, 0, 9999), (400, 9999), (9999,)])
async def test_a_cut_connection_is_made_again_and_no_event_is_missing_or_twice(
    cuts: tuple[int, ...],
) -> None:
    many = [ONE, *[TWO] * 8]
    async with open_job(stream(STARTED, *many, END)) as (queen, job):
        await job.result()
        async with open_cutter(queen.url, *cuts) as url:
            events = AsyncClient(url, TOKEN).job(job.id).events()
            got = [event async for event in events]
        assert [type(event) for event in got] == [Queued, Started, *[Token] * 9, End]
        assert events.answer.text == "one" + " two" * 8
        assert events.last_seen == 12


async def test_a_queen_that_stays_away_is_told_after_some_tries() -> None:
    async with open_job(*WHOLE) as (queen, job):
        async with open_cutter(queen.url, 300) as url:
            with pytest.raises(PeerError, match="closed the connection"):
                await AsyncClient(url, TOKEN).job(job.id).result()
        with pytest.raises(UnavailableError):
            await AsyncClient(url, TOKEN).job(job.id).result()
        async with open_cutter(queen.url, 300) as url:
            owned = AsyncClient(url, TOKEN)
            owned._owner = "keeper-1"
            with pytest.raises(OwnerGoneError):
                await owned.job(job.id).result()


async def test_a_script_uses_the_same_calls() -> None:
    async with open_queen(FakeWorker([*WHOLE, *HELD])) as queen:

        def script(url: str) -> None:
            client = Client(url, TOKEN)
            job = client.enqueue("words", "hi", engine="echo")
            assert job.result().text == "one two"
            with job.events() as events:
                assert [type(event) for event in events] == KINDS
                assert (events.last_seen, events.answer.text) == (5, "one two")
            assert list(job.events(last_seen=4).text()) == []
            assert job.status().state == "ended"
            held = client.enqueue("words", "hi", engine="echo")
            assert next(held.events().text()) == "one"
            assert [info.job_id for info in client.jobs()] == [job.id, held.id]
            client.job(held.id).cancel()
            with pytest.raises(CancelledError):
                held.result()

        async with open_cutter(queen.url, 9999, 300, *[9999] * 12) as url:
            await beside(script, url)


async def test_asyncio_programs_use_the_same_job() -> None:
    async with open_queen(FakeWorker(WHOLE)) as queen:

        async def program(url: str) -> None:
            job = await AsyncClient(url, TOKEN).enqueue("words", "hi", engine="echo")
            assert (await job.result()).text == "one two"
            assert [type(event) async for event in job.events()] == KINDS

        async with open_cutter(queen.url, 9999, 300, 0, 9999, 9999) as url:
            await beside(asyncio.run, program(url))
        await wait_for(lambda: not len(queen.jobs))
