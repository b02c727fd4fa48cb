"""Work as a stream: what it tells, then exactly one last event; it ends with its reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.errors import InsufficientError, UnavailableError
from rbee.web.narrated import BUFFER, Tell, Work, Works, narrated
from rbee.web.router import Stream
from rbee.wire import sse
from rbee.wire.messages import Narration, Pulled

FETCH = Narration("hive", "fetch", "it", 0.5)


async def read(work: Work, narrate: Callable[[Work], Stream] = narrated) -> list[tuple[str, str]]:
    sent: list[bytes] = []

    async def emit(chunk: bytes) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(chunk)

    await narrate(work).run(emit)
    return list(sse.Decoder().feed(b"".join(sent)))


async def test_what_is_told_comes_first_and_the_result_last() -> None:
    async def work(tell: Tell) -> Pulled:
        tell(FETCH)
        await trio.lowlevel.checkpoint()
        return Pulled("m", "/there")

    (first, told), (last, result) = await read(work)
    assert (first, last) == ("narration", "pulled")
    assert '"share": 0.5' in told or '"share":0.5' in told
    assert "/there" in result


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InsufficientError("no room", hint="free some"), '"code":"insufficient"'),
        (ExceptionGroup("", [InsufficientError("no room")]), '"code":"insufficient"'),
        (PermissionError(13, "Permission denied"), '"code":"machine"'),
    ],
)
async def test_a_failure_is_the_last_event(error: Exception, told: str) -> None:
    async def work(tell: Tell) -> Any:
        tell(FETCH)
        raise error

    events = await read(work)
    assert [name for name, _ in events] == ["narration", "error"]
    assert told in events[-1][1]


async def test_a_daemon_that_stops_still_has_a_last_event_for_each(autojump_clock: Any) -> None:
    works = Works(lambda: UnavailableError("the queen is stopping", code="queen_stopping"))
    ended: list[list[tuple[str, str]]] = []

    async def work(tell: Tell) -> Any:
        tell(FETCH)
        await trio.sleep_forever()

    async def one() -> None:
        ended.append(await read(work, works.narrated))

    async with trio.open_nursery() as nursery:
        async with works.open():
            nursery.start_soon(one)
            await wait_all_tasks_blocked()
        nursery.start_soon(one)  # one that comes too late
    told = [[name for name, _ in events] for events in ended]
    assert sorted(told) == [["error"], ["narration", "error"]]
    assert all("queen_stopping" in events[-1][1] for events in ended)


async def test_what_is_told_faster_than_it_is_read_is_lost_but_never_the_end() -> None:
    async def work(tell: Tell) -> Pulled:
        for _ in range(3 * BUFFER):
            tell(FETCH)
        return Pulled("m", "/there")

    names = [name for name, _ in await read(work)]
    assert names.count("narration") == BUFFER
    assert names[-1] == "pulled"


async def test_the_work_ends_with_its_reader() -> None:
    ended = trio.Event()

    async def work(tell: Tell) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, work)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert ended.is_set()
