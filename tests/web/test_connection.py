"""A client's connection: who has gone is known, whenever somebody begins to care."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio
from trio.testing import wait_all_tasks_blocked

from rbee.web.connection import Connection, watched
from rbee.web.poller import HUNG_UP, Poller, open_poller


@asynccontextmanager
async def open_connection() -> AsyncGenerator[tuple[Connection, socket.socket, Poller], None]:
    near, far = socket.socketpair()
    near.setblocking(False)
    with far:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(near))
        async with open_poller() as poller, stream:
            with watched(stream, poller) as connection:
                yield connection, far, poller
            assert len(poller) == 0


async def test_a_client_that_goes_is_told_to_who_watches() -> None:
    gone: list[str] = []
    async with open_connection() as (connection, far, _):
        connection.watch(gone.append)
        far.close()
        await wait_all_tasks_blocked(0.01)
    assert gone == ["the client has gone"]


async def test_a_client_that_has_gone_before_is_told_as_well() -> None:
    gone: list[str] = []
    async with open_connection() as (connection, far, _):
        far.close()
        await wait_all_tasks_blocked(0.01)
        connection.watch(gone.append)
    assert gone == ["the client has gone"]


async def test_who_watches_no_more_is_told_nothing() -> None:
    gone: list[str] = []
    async with open_connection() as (connection, far, _):
        connection.watch(gone.append)
        connection.unwatch()
        far.close()
        await wait_all_tasks_blocked(0.01)
    assert gone == []


async def test_hanging_up_ends_the_wait_for_a_request() -> None:
    async with open_connection() as (connection, _, __):
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.read_ahead)
                await wait_all_tasks_blocked()
                connection.hang_up()
    assert connection.ahead == b""


async def test_who_was_left_to_another_takes_no_number_from_who_has_it_by_now() -> None:
    async with open_connection() as (connection, _, poller):
        connection.let_go()
        fd = connection.line.fileno()
        poller.add(fd, HUNG_UP, bool)  # as of another, once this one has been closed
        connection.let_go()
        assert len(poller) == 1
        poller.remove(fd)
