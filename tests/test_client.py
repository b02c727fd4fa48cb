from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio

from rbee.client import KEEP_A_QUEEN, AsyncClient, TaskEvents, TaskStream
from rbee.errors import (
    BadInputError,
    InsufficientError,
    NotFoundError,
    OwnerGoneError,
    PeerError,
    QueueFullError,
    UnauthorizedError,
    UnavailableError,
)
from rbee.wire.messages import (
    End,
    Error,
    ModelInfo,
    Narration,
    Pulled,
    PullModel,
    Queued,
    Started,
    TaskRequest,
    Token,
)
from tests.keeper.fake_queen import HIVE, TOKEN, WORKER, FakeQueen, answer, open_fake

TASK = TaskRequest("m", prompt="hi")


@asynccontextmanager
async def open_stream(
    queen: FakeQueen | None = None,
) -> AsyncGenerator[tuple[FakeQueen, TaskStream], None]:
    async with (
        open_fake(queen) as (fake, url),
        AsyncClient(url, TOKEN) as client,
        client.stream(TASK) as stream,
    ):
        yield fake, stream


async def test_a_job_yields_its_typed_events_and_ends() -> None:
    async with open_stream() as (queen, stream):
        assert stream.job_id == "job-1"
        events = [event async for event in stream]
        assert [event async for event in stream] == []
    assert [type(event) for event in events] == [
        Queued, Narration, Started, Token, Token, Token, End,
    ]  # fmt: skip
    assert "".join(event.t for event in events if isinstance(event, Token)) == "Hello world"
    assert queen.tasks == [TASK]


async def test_events_arrive_one_by_one() -> None:
    queen = FakeQueen(script=[Token("a", 1), None])
    async with open_fake(queen) as (_, url), AsyncClient(url, TOKEN) as client:
        with trio.fail_after(5):
            async with client.stream(TASK) as stream:
                assert await anext(stream) == Token("a", 1)


async def test_leaving_a_stream_cancels_its_job() -> None:
    queen = FakeQueen(script=[Token("a", 1), None])
    async with open_fake(queen) as (_, url), AsyncClient(url, TOKEN) as client:
        async with client.stream(TASK) as stream:
            await anext(stream)
        with trio.fail_after(5):
            await queen.cancelled.wait()


async def test_an_error_event_is_raised_as_its_class() -> None:
    queen = FakeQueen(script=[Error("queue_full", "full", "later")])
    async with open_stream(queen) as (_, stream):
        with pytest.raises(QueueFullError) as caught:
            await anext(stream)
    assert (caught.value.message, caught.value.hint) == ("full", "later")


async def test_a_stream_without_a_terminal_event_is_the_peers_error() -> None:
    queen = FakeQueen(script=answer("a")[:-1])
    async with open_stream(queen) as (_, stream):
        with pytest.raises(PeerError, match="without a terminal event"):
            async for _event in stream:
                pass


async def test_a_stream_that_breaks_at_somebodys_owned_queen_tells_of_the_owner() -> None:
    queen = FakeQueen(script=answer("a")[:-1], owner="keeper-1")
    async with open_fake(queen) as (_, url), AsyncClient(url, TOKEN) as client:
        await client.health()
        async with client.stream(TASK) as stream:
            with pytest.raises(OwnerGoneError, match="keeper-1") as caught:
                async for _event in stream:
                    pass
    assert caught.value.hint == KEEP_A_QUEEN


async def test_lists_are_typed() -> None:
    async with open_fake() as (_, url), AsyncClient(url, TOKEN) as client:
        assert await client.workers() == [WORKER]
        assert await client.hives() == [HIVE]
        assert (await client.health()).component == "queen"


async def test_a_wrong_token_is_refused() -> None:
    async with open_fake() as (_, url), AsyncClient(url, "wrong") as client:
        with pytest.raises(UnauthorizedError, match="token"):
            await client.workers()
        assert (await client.health()).id == "queen-1"  # open


async def test_a_route_that_the_queen_does_not_have_is_not_found() -> None:
    async with open_fake() as (_, url), AsyncClient(url, TOKEN) as client:
        with pytest.raises(NotFoundError, match="/v2/nowhere"):
            await client._call("GET", "/v2/nowhere", None)


async def test_models_are_listed_and_removed_by_node_and_name() -> None:
    info = ModelInfo("hf:org/m", "hf--m+1", "n1", "/there")
    queen = FakeQueen(models=[info])
    async with open_fake(queen) as (_, url), AsyncClient(url, TOKEN) as client:
        assert await client.models() == [info]
        await client.remove_model(info.name, node="n1")
        await client.remove_model(info.name)
    assert queen.removed == ["n1/hf--m+1", "localhost/hf--m+1"]


async def test_a_pull_tells_what_happens_and_returns_the_directory() -> None:
    told: list[Narration] = []

    async def narrate(narration: Narration) -> None:
        told.append(narration)

    narration, pulled = Narration("hive", "fetch", "m", 0.5), Pulled("hf:org/m", "/there")
    queen = FakeQueen(script=[narration, pulled])
    async with open_fake(queen) as (_, url), AsyncClient(url, TOKEN) as client:
        assert await client.pull(PullModel("m"), narrate) == pulled
        assert told == [narration]
        queen.script = [narration]
        with pytest.raises(PeerError, match="without a terminal event"):
            await client.pull(PullModel("m"))
        queen.script = [Error("insufficient", "no room", "free some")]
        with pytest.raises(InsufficientError, match="no room"):
            await client.pull(PullModel("m"))


async def test_leaving_a_pull_cancels_it() -> None:
    queen = FakeQueen(script=[Narration("hive", "fetch", "m"), None])
    async with open_fake(queen) as (_, url), AsyncClient(url, TOKEN) as client:
        with trio.CancelScope() as scope:

            async def leave(narration: Narration) -> None:
                scope.cancel()

            await client.pull(PullModel("m"), leave)
        with trio.fail_after(5):
            await queen.cancelled.wait()


async def test_nobody_at_the_address_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with AsyncClient(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(UnavailableError, match=str(port)) as caught:
            await client.health()
    assert caught.value.code == "unreachable"


@pytest.mark.parametrize("url", ["", "localhost:8080", "ftp://x", "http://", "http://h:99999"])
def test_what_is_no_url_is_bad_input(url: str) -> None:
    with pytest.raises(BadInputError, match="URL"):
        AsyncClient(url)


def test_the_reading_of_events_needs_no_connection() -> None:
    events = TaskEvents()
    assert events.event("queued", '{"job_id":"j","position":2}') == Queued("j", 2)
    assert events.job_id == "j"
    assert events.event("something-new", "{}") is None
    assert not events.ended
    with pytest.raises(OwnerGoneError) as caught:
        events.event("error", '{"code":"owner_gone","message":"gone","hint":""}')
    assert caught.value.hint == KEEP_A_QUEEN
    assert events.ended
