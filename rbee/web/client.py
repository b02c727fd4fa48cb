"""Typed HTTP calls between daemons: httpx, our errors, no proxies."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import httpcore  # noqa: F401 - httpx does with its first client: in each forked worker again
import httpx
import trio

from rbee.errors import BadInputError, PeerError, RbeeError, UnavailableError
from rbee.trace import forwarded
from rbee.wire import codec, refusal, sse

T = TypeVar("T")

CONNECT = 5.0
PROBE = 5.0
ANSWER = 10.0  # seconds for a control call


def open_client(base_url: str = "", token: str = "") -> httpx.AsyncClient:
    """Make a client for one peer: connect within 5 s, never a total limit, no environment."""
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.AsyncClient(
        base_url=base_url,
        headers=headers,
        trust_env=False,  # HTTP_PROXY would catch loopback
        verify=not base_url.startswith("http:"),  # a TLS context costs 0.1 s
        timeout=httpx.Timeout(None, connect=CONNECT),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
    )


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn httpx's errors into ours, naming the peer."""
    try:
        yield
    except httpx.ConnectError as exc:
        raise UnavailableError(f"{what} does not answer: {exc}", code="unreachable") from exc
    except httpx.TimeoutException as exc:
        raise UnavailableError(f"{what} did not answer in time", code="unreachable") from exc
    except (httpx.HTTPError, httpx.StreamError) as exc:
        raise PeerError(f"{what} broke the connection: {exc or type(exc).__name__}") from exc


def error_of(response: httpx.Response) -> RbeeError:
    """Rebuild the error of a response whose body has been read."""
    return refusal.error_of(response.status_code, response.content)


async def call(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    kind: type[T],
    body: Any = None,
    *,
    what: str,
    limit: float = ANSWER,
) -> T:
    """Send one request and return its typed answer; ``what`` names the peer in errors.

    Raises:
        UnavailableError: nobody answers, or not within ``limit`` seconds (a frozen process).
    """
    content = None if body is None else codec.dumps(body)
    headers = forwarded()
    if body is not None:
        headers["content-type"] = "application/json"
    _check_open(client, what)
    with answering_within(limit, what), translated(what):
        response = await client.request(method, path, content=content, headers=headers)
    if response.status_code >= 400:
        raise error_of(response)
    if kind is type(None) or not response.content:
        return None  # type: ignore[return-value]
    try:
        return codec.loads(response.content, kind)
    except BadInputError as exc:  # of the peer's, not of whoever called us
        raise PeerError(f"{what} gave a wrong answer: {exc.message}") from exc


def _check_open(client: httpx.AsyncClient, what: str) -> None:
    """Refuse what httpx takes for a bug: the peer has ended, and not everybody has heard of it."""
    if client.is_closed:
        raise UnavailableError(f"{what} has ended", code="unreachable")


@contextmanager
def answering_within(limit: float, what: str) -> Iterator[None]:
    """Raise `UnavailableError` if the body, which waits for a peer, takes longer."""
    with trio.move_on_after(limit) as scope:
        yield
    if scope.cancelled_caught:
        raise UnavailableError(f"{what} did not answer within {limit:g} s", code="unresponsive")


@asynccontextmanager
async def open_events(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    body: Any = None,
    *,
    what: str,
    headers: Mapping[str, str] | None = None,
) -> AsyncGenerator[EventStream, None]:
    """Open a stream of server-sent events; closed with the body of the ``async with``."""
    content = None if body is None else codec.dumps(body)
    headers = {"accept": sse.CONTENT_TYPE.decode(), **forwarded(), **(headers or {})}
    if body is not None:
        headers["content-type"] = "application/json"
    request = client.build_request(method, path, content=content, headers=headers)
    _check_open(client, what)
    with translated(what):
        response = await client.send(request, stream=True)
    stream = EventStream(response, what)
    try:
        if response.status_code >= 400:
            with translated(what):
                await response.aread()
            raise error_of(response)
        yield stream
    finally:
        await response.aclose()
        await stream._run_out()


class EventStream:
    """Iterate ``(name, data)`` pairs as they come, or raw bytes with `chunks`."""

    def __init__(self, response: httpx.Response, what: str) -> None:
        self._chunks = response.aiter_raw()
        self._what = what
        self._decoder = sse.Decoder()
        self._ready: list[tuple[str, str]] = []
        self.headers = response.headers

    async def chunk(self) -> bytes:
        """Return the next bytes, b"" at the end."""
        with translated(self._what):
            return await anext(self._chunks, b"")

    async def _run_out(self) -> None:
        """Let httpx's nested generators end; left hanging, trio warns when they are collected."""
        with suppress(httpx.HTTPError, httpx.StreamError):
            while await anext(self._chunks, b""):
                pass

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> tuple[str, str]:
        while not self._ready:
            chunk = await self.chunk()
            if not chunk:
                raise StopAsyncIteration
            self._ready = list(self._decoder.feed(chunk))
        return self._ready.pop(0)


async def keep_probing(
    client: httpx.AsyncClient, tell: Callable[[bool], None], *, every: float = PROBE
) -> None:
    """Ask a daemon's health for ever; call ``tell`` whenever it begins or ceases to answer.

    A frozen process keeps its connections, so only this shows it: within twice ``every``.
    """
    answered = True
    while True:
        await trio.sleep(every)
        answers = await _answers(client, every)
        if answers != answered:
            answered = answers
            tell(answers)


async def _answers(client: httpx.AsyncClient, limit: float) -> bool:
    with trio.move_on_after(limit):
        try:
            return (await client.get("/health")).status_code == 200
        except httpx.HTTPError:
            return False
    return False
