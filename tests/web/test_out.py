"""Answers that are read in full: no peer can keep us waiting, or fill our memory, with one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from rbee.errors import PeerError
from rbee.web.out import LARGEST, read_all
from rbee.web.upstream import Answer
from tests.web.test_upstream import CHUNKED, HEAD, SHORT, Peer, Serve, serving


@asynccontextmanager
async def answered(peer: Peer | Serve) -> AsyncGenerator[Answer, None]:
    headers = ((b"host", b"w"),)
    with trio.fail_after(5):
        async with (
            serving(peer) as (upstreams, address),
            upstreams.ask(address, "POST", b"/", headers, b"{}", "the worker") as answer,
        ):
            yield answer


@pytest.mark.parametrize("answer", [SHORT, CHUNKED + b"3\r\nabc\r\n0\r\n\r\n"])
async def test_an_answer_is_read_to_its_end(answer: bytes) -> None:
    async with answered(Peer([answer])) as one:
        assert await read_all(one) == b"abc"


async def test_the_largest_answer_is_read() -> None:
    large = HEAD + b"content-length: %d\r\n\r\n" % LARGEST + b"x" * LARGEST
    async with answered(Peer([large])) as answer:
        assert len(await read_all(answer)) == LARGEST


@pytest.mark.parametrize("begun", [SHORT[:-1], CHUNKED, CHUNKED + b"3\r\nabc\r\n"])
async def test_a_peer_that_falls_silent_is_told(begun: bytes) -> None:
    async with answered(Peer([begun])) as answer:
        with pytest.raises(PeerError, match=r"nothing came for 0.1 s") as info:
            await read_all(answer, 0.1)
    assert info.value.code == "stalled"


async def test_no_peer_may_be_silent_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbee.web.out.SILENCE", 0.1)
    async with answered(Peer([SHORT[:-1]])) as answer:
        with pytest.raises(PeerError, match=r"nothing came for 0.1 s"):
            await read_all(answer, float("inf"))


async def test_an_answer_without_end_is_given_up() -> None:
    sent = 0

    async def flood(stream: trio.SocketStream) -> None:
        nonlocal sent
        async with stream:
            await stream.receive_some()
            with suppress(trio.BrokenResourceError):
                await stream.send_all(HEAD + b"\r\n")
                while True:
                    await stream.send_all(b"x" * 65536)
                    sent += 65536

    async with answered(flood) as answer:
        with pytest.raises(PeerError, match=r"more than 1\.0 MiB"):
            await read_all(answer)
    assert sent < 32 << 20
