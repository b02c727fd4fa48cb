"""The client without a loop, and the one for asyncio: same calls, same errors, same cancelling."""

from __future__ import annotations

import asyncio
import inspect
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import trio
import trio.lowlevel

from rbee import AsyncClient, AsyncJob, Client, Job, Message
from rbee.blocking import TaskStream, finish
from rbee.errors import PeerError, QueueFullError, UnavailableError
from rbee.home import Home
from rbee.stream import TaskStream as AsyncTaskStream
from rbee.wire.messages import Error, Narration, StartWorker, TaskRequest, Token
from tests.keeper.fake_queen import HIVE, TOKEN, WORKER, FakeQueen, answer, open_fake

T = TypeVar("T")
HELD: list[object] = [*answer("a")[:-1], None]


async def beside(fn: Callable[..., T], *args: Any) -> T:
    """Call what blocks beside the fake queen."""
    with trio.fail_after(10):
        return await trio.to_thread.run_sync(fn, *args)


def offered(kind: type) -> dict[str, list[tuple[str, Any, Any]] | None]:
    """Return what a class offers: its properties, and its calls with their parameters."""
    names = [name for name in dir(kind) if not name.startswith("_")]
    members = {name: getattr(kind, name) for name in names}
    return {name: parameters(one) if callable(one) else None for name, one in members.items()}


def parameters(call: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    known = inspect.signature(call).parameters.values()
    return [(one.name, one.kind, one.default) for one in known]


@pytest.mark.parametrize(
    ("plain", "other"), [(Client, AsyncClient), (Job, AsyncJob), (TaskStream, AsyncTaskStream)]
)
def test_both_clients_offer_the_same_calls(plain: type, other: type) -> None:
    assert offered(plain) == offered(other)


def test_both_clients_are_made_with_the_same_arguments() -> None:
    transport = ("connect", "pause")  # what makes one of them block
    assert parameters(Client) == [one for one in parameters(AsyncClient) if one[0] not in transport]


async def test_a_script_gets_typed_answers() -> None:
    async with open_fake() as (queen, url):
        client = Client(url, TOKEN)

        def script() -> None:
            found = client.infer("m", "hi", max_tokens=3, temperature=0.5)
            assert (found.text, str(found), found.job_id) == ("Hello world", "Hello world", "job-1")
            assert (found.worker_id, found.tokens_out, found.stop_reason) == ("worker-1", 3, "stop")
            assert list(client.stream("m", "hi").text()) == ["Hello", " ", "world"]
            with client.stream("m", "hi") as stream:
                kinds = [type(event).__name__ for event in stream]
            assert kinds == ["Queued", "Narration", "Started", *["Token"] * 3, "End"]
            assert stream.answer == found
            said = [{"role": "system", "content": "Be brief"}, Message("user", "hi")]
            client.chat("m", said)
            assert client.workers() == [WORKER]
            assert client.hives() == [HIVE]
            assert client.health().component == "queen"

        await beside(script)
    assert queen.tasks[0] == TaskRequest("m", "hi", max_tokens=3, temperature=0.5)
    assert queen.tasks[-1].messages == (Message("system", "Be brief"), Message("user", "hi"))


async def test_leaving_the_loop_cancels_the_job() -> None:
    def leave_loop(client: Client) -> None:
        for piece in client.stream("m", "hi").text():
            assert piece == "a"
            break

    def leave_block(client: Client) -> None:
        with client.stream("m", "hi") as stream:
            next(stream)

    for leave in (leave_loop, leave_block):
        async with open_fake(FakeQueen(script=HELD)) as (queen, url):
            await beside(leave, Client(url, TOKEN))
            with trio.fail_after(5):
                await queen.cancelled.wait()


async def test_errors_are_raised_as_their_classes() -> None:
    queen = FakeQueen(script=[Error("queue_full", "full", "later")])
    async with open_fake(queen) as (_, url):
        client = Client(url, TOKEN)
        with pytest.raises(QueueFullError) as caught:
            await beside(client.infer, "m", "hi")
        assert (caught.value.code, caught.value.hint) == ("queue_full", "later")
        queen.script = answer("a")[:-1]
        with pytest.raises(PeerError, match="without a terminal event"):
            await beside(client.infer, "m", "hi")


async def test_what_happens_is_told_on_the_way() -> None:
    told: list[Narration] = []
    async with open_fake() as (_, url):
        client = Client(url, TOKEN)
        info = await beside(client.start_worker, StartWorker("m"), told.append)
    assert info.state == "ready"
    assert told


def test_nobody_at_the_address_or_no_queen_at_all_is_unavailable(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UnavailableError, match=str(port)):
        Client(f"http://127.0.0.1:{port}").health()
    with pytest.raises(UnavailableError, match=f"no queen of {home.root} runs") as caught:
        Client()
    assert caught.value.hint == "rbee-keeper queen start"


async def test_asyncio_programs_use_the_same_client() -> None:
    async def program(url: str) -> None:
        client = AsyncClient(url, TOKEN)
        assert (await client.infer("m", "hi")).text == "Hello world"
        assert [piece async for piece in client.stream("m", "hi").text()] == ["Hello", " ", "world"]
        assert await client.workers() == [WORKER]

    async with open_fake() as (_, url):
        await beside(asyncio.run, program(url))


@pytest.mark.parametrize("how", ["loop", "cancel"])
async def test_leaving_a_stream_in_asyncio_cancels_the_job(how: str) -> None:
    async def leave_loop(client: AsyncClient) -> None:
        async for _ in client.stream("m", "hi").text():
            break

    async def be_cancelled(client: AsyncClient) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.infer("m", "hi"), 0.2)

    leave = leave_loop if how == "loop" else be_cancelled
    async with open_fake(FakeQueen(script=HELD)) as (queen, url):
        await beside(asyncio.run, leave(AsyncClient(url, TOKEN)))
        with trio.fail_after(5):
            await queen.cancelled.wait()


async def test_leaving_the_loop_in_trio_cancels_the_job() -> None:
    async with open_fake(FakeQueen(script=HELD)) as (queen, url):
        async for _ in AsyncClient(url, TOKEN).stream("m", "hi").text():
            break
        with trio.fail_after(5):
            await queen.cancelled.wait()


def test_a_stream_left_to_the_collector_after_trio_has_ended_is_closed() -> None:
    async def program() -> object:
        async with open_fake(FakeQueen(script=HELD)) as (_, url):
            stream = AsyncClient(url, TOKEN).stream("m", "hi")
            await anext(stream)
            return stream

    assert trio.run(program) is not None


def test_a_coroutine_that_suspends_is_a_bug_that_is_told() -> None:
    with pytest.raises(RuntimeError, match="suspended"):
        finish(trio.lowlevel.checkpoint())  # noqa: ASYNC105


async def test_a_token_costs_the_client_little() -> None:
    """Counted in the client's thread alone; the figure is 100 µs."""
    tokens = 2000
    queen = FakeQueen(
        script=[*answer()[:-1], *(Token(" word", i) for i in range(tokens)), answer()[-1]]
    )
    async with open_fake(queen) as (_, url):
        client = Client(url, TOKEN)

        def read() -> float:
            began = time.thread_time()
            for _ in client.stream("m", "hi"):
                pass
            return time.thread_time() - began

        await beside(read)
        assert await beside(read) / tokens < 0.0002
