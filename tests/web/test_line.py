"""A plain connection: no task switch where nothing is waited for, nothing lost where it is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from trio.testing import assert_checkpoints, assert_no_checkpoints

from rbee.web.line import Line, open_line

BIG = bytes(range(256)) * 20_000


@contextmanager
def pair() -> Iterator[tuple[Line, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        yield Line(near.fileno()), far


async def test_only_waiting_lets_others_run() -> None:
    with pair() as (line, far):
        with assert_no_checkpoints():
            await line.send(b"abc")
        assert far.recv(10) == b"abc"
        far.send(b"def")
        with assert_checkpoints():
            assert await line.receive() == b"def"


async def test_all_is_sent_though_the_peer_reads_slowly() -> None:
    got = b""
    with pair() as (line, far):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.send, BIG)
            with trio.fail_after(5):
                while len(got) < len(BIG):
                    await trio.lowlevel.wait_readable(far)
                    got += far.recv(10_000)
    assert got == BIG


async def test_the_end_is_nothing_and_a_break_an_error() -> None:
    with pair() as (line, far):
        far.shutdown(socket.SHUT_WR)
        assert await line.receive() == b""
        far.close()
        with pytest.raises(OSError, match="pipe"):
            await line.send(b"abc")


async def test_who_waits_can_be_cancelled() -> None:
    with pair() as (line, _), trio.move_on_after(0.01) as scope:
        await line.receive()
    assert scope.cancelled_caught


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_an_address_and_a_name_lead_there(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line = await open_line(host, listener.getsockname()[1])
        await line.send(b"abc")
        with listener.accept()[0] as far:
            assert far.recv(10) == b"abc"
        line.close()


async def test_nobody_there_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        await open_line("127.0.0.1", port)
