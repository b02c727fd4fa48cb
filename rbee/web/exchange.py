"""One HTTP/1.1 request and its answer, on a connection of its own.

The command line lives here: importing httpx and its transports takes longer than a warm model
needs for its first token. Heads are parsed by httptools.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from urllib.parse import urlsplit

import attrs
import httptools

from rbee.errors import BadInputError, PeerError, UnavailableError
from rbee.web.transport import CONNECT, Connect, Transport, connect

BROKEN = "stream_broken"  # the one we talk to went away in the middle
MAX_HEAD = 1 << 16


@attrs.frozen
class Address:
    """Where a peer is: ``http://host:port`` or, behind a proxy, ``https://host/prefix``."""

    host: str
    port: int
    tls: bool
    authority: str
    prefix: str = ""

    @classmethod
    @lru_cache(maxsize=1024)
    def parse(cls, url: str) -> Address:
        """Take a URL apart; raise `BadInputError` if it is not one for HTTP."""
        parts = urlsplit(url)
        try:
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (ValueError, KeyError):
            port = 0
        if not parts.hostname or not port or not url.isascii() or not url.isprintable():
            raise BadInputError(
                f"{url!r} is not the URL of a daemon (needed: http://HOST:PORT)",
                hint="rbee-keeper status --queen-url http://127.0.0.1:8080",
            )
        authority = parts.netloc.rpartition("@")[2]
        return cls(parts.hostname, port, parts.scheme == "https", authority, parts.path.rstrip("/"))


class Exchange:
    """The answer to one request: its head, then its body as it comes."""

    def __init__(self, transport: Transport, what: str) -> None:
        self._transport = transport
        self._what = what
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: deque[bytes] = deque()
        self._has_head = False
        self._complete = False
        self._head_size = 0
        self.status = 0
        self.headers: dict[str, str] = {}

    async def send(self, data: bytes) -> None:
        """Send the request; whoever does not take it all may have refused early, and said why."""
        with suppress(OSError):
            await self._transport.send(data)

    def abort(self) -> None:
        """Close the connection at once; safe to call again."""
        self._transport.abort()

    async def read_head(self) -> None:
        while not self._has_head:
            if not await self._receive():
                raise PeerError(
                    f"{self._what} closed the connection before it answered", code=BROKEN
                )

    async def chunk(self) -> bytes:
        """Return what has come of the body, b"" at its end; raise `PeerError` if it breaks off."""
        while not self._chunks and not self._complete:
            if not await self._receive():
                if "content-length" in self.headers or "transfer-encoding" in self.headers:
                    raise PeerError(f"{self._what} broke the connection", code=BROKEN)
                self._complete = True
        data = b"".join(self._chunks)
        self._chunks.clear()
        return data

    async def body(self) -> bytes:
        parts = []
        while chunk := await self.chunk():
            parts.append(chunk)
        return b"".join(parts)

    async def _receive(self) -> bool:
        try:
            data = await self._transport.receive()
            self._parser.feed_data(data)
        except OSError as exc:
            raise PeerError(f"{self._what} broke the connection", code=BROKEN) from exc
        except httptools.HttpParserError as exc:
            raise PeerError(f"{self._what} does not speak HTTP: {exc}") from exc
        self._head_size += 0 if self._has_head else len(data)
        if self._head_size > MAX_HEAD:
            raise PeerError(f"{self._what} sent a head of more than {MAX_HEAD} bytes")
        return bool(data)

    # called by httptools
    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._has_head = True

    def on_body(self, data: bytes) -> None:
        self._chunks.append(data)

    def on_message_complete(self) -> None:
        self._complete = True


@asynccontextmanager
async def open_exchange(
    address: Address,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str],
    body: bytes = b"",
    what: str,
    connect: Connect = connect,
) -> AsyncGenerator[Exchange, None]:
    """Send a request; the body runs once the answer's head is there, and closes with it.

    Raises:
        UnavailableError: nobody answers at the address within 5 s.
        PeerError: whoever answers breaks off or does not speak HTTP.
    """
    exchange = await start_exchange(
        address, method, path, headers=headers, body=body, what=what, connect=connect
    )
    try:
        yield exchange
    finally:
        exchange.abort()


async def start_exchange(
    address: Address,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str],
    body: bytes = b"",
    what: str,
    connect: Connect = connect,
) -> Exchange:
    """Do as `open_exchange`; the caller aborts what it returns."""
    head = _head(address, method, path, headers, len(body))
    exchange = Exchange(await _connected(address, what, connect), what)
    try:
        await exchange.send(head + body)
        await exchange.read_head()
    except BaseException:
        exchange.abort()
        raise
    return exchange


async def _connected(address: Address, what: str, connect: Connect) -> Transport:
    try:
        return await connect(address.host, address.port, address.tls)
    except TimeoutError as exc:
        raise UnavailableError(
            f"{what} did not answer within {CONNECT:.0f} s", code="unreachable"
        ) from exc
    except OSError as exc:
        raise UnavailableError(f"{what} does not answer: {exc}", code="unreachable") from exc


def _head(address: Address, method: str, path: str, headers: Mapping[str, str], size: int) -> bytes:
    all_headers = {"host": address.authority, "connection": "close", **headers}
    if size or method == "POST":
        all_headers["content-length"] = str(size)
    lines = [f"{method} {address.prefix}{path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in all_headers.items()]
    if not all(line.isprintable() and line.isascii() for line in lines):
        raise BadInputError("a token or URL holds what cannot stand in a request's head")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
