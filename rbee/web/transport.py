"""A connection as bytes, for each style of concurrency: trio, asyncio, or one that blocks.

All three raise `OSError` when the connection breaks. `abort` never waits, so that whoever is no
longer interested can close it from anywhere, a finaliser too.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import trio

if TYPE_CHECKING:
    import asyncio

CONNECT = 5.0
CHUNK = 65536


class Transport(Protocol):
    """One connection."""

    async def receive(self) -> bytes:
        """Return what has come, b"" at its end."""
        ...

    async def send(self, data: bytes) -> None: ...

    def abort(self) -> None:
        """Close it at once; safe to call again."""
        ...


Connect = Callable[[str, int, bool], Awaitable[Transport]]
"""Connect to host and port, with TLS or without, within `CONNECT` seconds.

Raises `TimeoutError` or another `OSError`.
"""


async def connect(host: str, port: int, tls: bool) -> Transport:
    """Connect in the style of whoever runs this coroutine: trio or asyncio."""
    from sniffio import current_async_library

    if current_async_library() == "asyncio":
        return await connect_asyncio(host, port, tls)
    return await connect_trio(host, port, tls)


Pause = Callable[[float], Awaitable[None]]
"""Waits for some seconds."""


async def pause(seconds: float) -> None:
    """Wait in the style of whoever runs this coroutine: trio or asyncio."""
    from sniffio import current_async_library

    if current_async_library() == "asyncio":
        import asyncio

        await asyncio.sleep(seconds)
    else:
        await trio.sleep(seconds)


# trio -----------------------------------------------------------------------------------------
class TrioTransport:
    def __init__(self, stream: trio.abc.Stream, tcp: trio.SocketStream) -> None:
        self._stream = stream
        self._tcp = tcp

    async def receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(CHUNK))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise ConnectionError(str(exc) or str(exc.__cause__ or "")) from exc

    async def send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise ConnectionError(str(exc) or str(exc.__cause__ or "")) from exc

    def abort(self) -> None:
        try:
            self._tcp.socket.close()
        except RuntimeError:  # trio has ended: nobody can wait for it any more
            os.close(self._tcp.socket.detach())


async def connect_trio(host: str, port: int, tls: bool) -> Transport:
    try:
        with trio.fail_after(CONNECT):
            tcp = await trio.open_tcp_stream(host, port)
            return TrioTransport(await _with_tls(tcp, host) if tls else tcp, tcp)
    except trio.TooSlowError as exc:
        raise TimeoutError from exc
    except trio.BrokenResourceError as exc:
        raise ConnectionError(str(exc) or str(exc.__cause__ or "")) from exc


async def _with_tls(tcp: trio.SocketStream, host: str) -> trio.abc.Stream:
    context = ssl.create_default_context()
    stream = trio.SSLStream(tcp, context, server_hostname=host, https_compatible=True)
    try:
        await stream.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(tcp)
        raise
    return stream


# asyncio --------------------------------------------------------------------------------------
class AsyncioTransport:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def receive(self) -> bytes:
        return await self._reader.read(CHUNK)

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def abort(self) -> None:
        with suppress(RuntimeError):  # its loop is closed, and the connection with it
            self._writer.transport.abort()


async def connect_asyncio(host: str, port: int, tls: bool) -> Transport:
    import asyncio

    async with asyncio.timeout(CONNECT):
        context = ssl.create_default_context() if tls else None
        return AsyncioTransport(*await asyncio.open_connection(host, port, ssl=context))


# blocking -------------------------------------------------------------------------------------
class BlockingTransport:
    """Its coroutines never suspend: they block."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._pid = os.getpid()

    async def receive(self) -> bytes:
        return self._sock.recv(CHUNK)

    async def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def abort(self) -> None:
        if os.getpid() == self._pid:  # a forked child lets go of its copy only
            with suppress(OSError):  # it wakes a thread that waits for more
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        self._sock.close()


async def pause_blocking(seconds: float) -> None:
    time.sleep(seconds)  # noqa: ASYNC251 - it never suspends


async def connect_blocking(host: str, port: int, tls: bool) -> Transport:
    sock = socket.create_connection((host, port), timeout=CONNECT)
    try:
        if tls:
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return BlockingTransport(sock)
