from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from rbee.errors import BadInputError, PeerError
from rbee.web.exchange import MAX_HEAD, Address, open_exchange


@asynccontextmanager
async def open_peer(*parts: bytes) -> AsyncGenerator[Address, None]:
    """Answer each connection with ``parts``, one send each, then close it."""

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            for part in parts:
                try:
                    await stream.send_all(part)
                except trio.BrokenResourceError:
                    return
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, answer, 0, host="127.0.0.1")
        listeners = await nursery.start(serve)
        port = listeners[0].socket.getsockname()[1]
        yield Address.parse(f"http://127.0.0.1:{port}")
        nursery.cancel_scope.cancel()


async def ask(address: Address, **headers: str) -> tuple[int, bytes]:
    with trio.fail_after(5):
        async with open_exchange(address, "GET", "/x", headers=headers, what="peer") as exchange:
            return exchange.status, await exchange.body()


GOOD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [GOOD + b"Content-Length: 3\r\n\r\nabc"],
        [b"HTTP/1.1 2", b"00 OK\r\ncontent-le", b"ngth: 3\r\n\r\n", b"a", b"bc"],
        [GOOD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nb", b"c\r\n0\r\n\r\n"],
        [b"HTTP/1.0 200 OK\r\n\r\na", b"bc"],
    ],
)
async def test_a_body_is_read_to_its_end_however_it_is_framed(parts: list[bytes]) -> None:
    async with open_peer(*parts) as address:
        assert await ask(address) == (200, b"abc")


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([], "before it answered"),
        ([GOOD], "before it answered"),
        ([GOOD + b"Content-Length: 3\r\n\r\na"], "broke the connection"),
        ([GOOD + b"Transfer-Encoding: chunked\r\n\r\n5\r\na"], "broke the connection"),
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], "does not speak HTTP"),
        ([GOOD + b"x: " + b"y" * MAX_HEAD], "a head of more than"),
    ],
)
async def test_a_peer_that_breaks_the_protocol_is_told_of(parts: list[bytes], told: str) -> None:
    async with open_peer(*parts) as address:
        with pytest.raises(PeerError, match=told):
            await ask(address)


async def test_a_token_cannot_smuggle_a_header() -> None:
    async with open_peer(GOOD) as address:
        with pytest.raises(BadInputError, match="head"):
            await ask(address, authorization="Bearer x\r\nhost: evil")


def test_an_address_keeps_the_prefix_of_a_proxy() -> None:
    assert Address.parse("https://host/rbee/") == Address("host", 443, True, "host", "/rbee")
    assert Address.parse("http://[::1]:8080") == Address("::1", 8080, False, "[::1]:8080")
