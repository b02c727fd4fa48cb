"""A small ASGI application: routes, checks at the door, errors as JSON, watched streams."""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeVar

import attrs
import trio

from rbee.errors import (
    BadInputError,
    ForbiddenError,
    NotFoundError,
    RbeeError,
    TooLargeError,
    UnauthorizedError,
)
from rbee.hints import infer
from rbee.wire import codec, messages, sse

log = logging.getLogger(__name__)

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Emit = Callable[[bytes], Awaitable[None]]

MAX_BODY = 32 << 20
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class MethodNotAllowedError(RbeeError):
    code = "method_not_allowed"
    http_status = 405


class UnsupportedMediaError(RbeeError):
    code = "unsupported_media"
    http_status = 415


@attrs.define(eq=False)
class Request:
    """One request: ``params`` come from the route's ``{names}``."""

    method: str
    path: str
    params: dict[str, str]
    headers: dict[bytes, bytes]
    _receive: Receive

    async def body(self) -> bytes:
        """Read the whole body; at most `MAX_BODY` bytes."""
        parts, size, more = [], 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise BadInputError("the body ended early")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MAX_BODY:
                raise TooLargeError(
                    f"a request has at most {MAX_BODY >> 20} MiB; this one is larger",
                    hint=f"head -c 1000000 FILE | {infer(prompt='-')}",
                )
            more = message.get("more_body", False)
        return b"".join(parts)

    async def read(self, kind: type[T]) -> T:
        """Read the body as JSON of the given wire class."""
        media = self.headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if media != b"application/json":
            raise UnsupportedMediaError("the body must be application/json")
        return codec.loads(await self.body(), kind)

    def accepts_events(self) -> bool:
        return sse.CONTENT_TYPE in self.headers.get(b"accept", b"")


@attrs.frozen
class Response:
    body: bytes = b""
    status: int = 200
    content_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


@attrs.frozen
class Stream:
    """An answer that goes on: ``run(emit)`` is cancelled when the client goes away.

    The head is sent with the first chunk: an `RbeeError` before it becomes a plain error response.
    """

    run: Callable[[Emit], Awaitable[None]]
    headers: tuple[tuple[bytes, bytes], ...] = ()


Handler = Callable[[Request], Awaitable[Response | Stream]]


def json_response(message: Any, status: int = 200) -> Response:
    return Response(codec.dumps(message), status)


def error_response(error: RbeeError) -> Response:
    detail = messages.ErrorDetail(
        code=error.code,
        message=error.message,
        hint=error.hint,
        details=error.details,
        correlation_id=secrets.token_hex(4),
    )
    log.info("refused [%s]: %s: %s", detail.correlation_id, error.code, error)
    headers = ((b"retry-after", b"1"),) if error.http_status in (429, 503) else ()
    return Response(codec.dumps(messages.ErrorBody(detail)), error.http_status, headers=headers)


class App:
    """Routes of one daemon.

    Args:
        token: what ``Authorization: Bearer`` must carry on every route that is not open.
        hosts: names allowed in ``Host`` beside loopback.
        fallback: takes what no route matches, after the same checks.
    """

    def __init__(
        self, *, token: str, hosts: Iterable[str] = (), fallback: Any | None = None
    ) -> None:
        self._token = token.encode()
        self._hosts = LOOPBACK_HOSTS | set(hosts)
        self._routes: list[tuple[str, list[str], Handler, bool]] = []
        self.fallback = fallback

    def add(self, method: str, path: str, handler: Handler, *, is_open: bool = False) -> None:
        self._routes.append((method, path.strip("/").split("/"), handler, is_open))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            route, others = self._match(scope["method"], scope["path"])
            self._check(headers, is_open=route is not None and route[2])
            if route is None:
                if others:
                    raise _wrong_method(scope, others)
                if self.fallback is None:
                    raise NotFoundError(f"no route {scope['method']} {scope['path']}")
                await self.fallback(scope, receive, send)
                return
            handler, params, _ = route
            request = Request(scope["method"], scope["path"], params, headers, receive)
            answer = await handler(request)
        except RbeeError as error:
            answer = error_response(error)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            answer = error_response(RbeeError("internal error, see the log"))
        if isinstance(answer, Stream):
            await _send_stream(answer, receive, send)
        else:
            await _send_response(answer, send)

    def _match(
        self, method: str, path: str
    ) -> tuple[tuple[Handler, dict[str, str], bool] | None, list[str]]:
        """Find the route; without one, the methods that the path does take."""
        parts = path.strip("/").split("/")
        others: list[str] = []
        for route_method, pattern, handler, is_open in self._routes:
            params = _match_parts(pattern, parts)
            if params is None:
                continue
            if route_method == method:
                return (handler, params, is_open), []
            others.append(route_method)
        return None, others

    def _check(self, headers: dict[bytes, bytes], *, is_open: bool) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if _hostname(host) not in self._hosts:
            raise ForbiddenError(f"Host {host!r} is not this daemon", code="unknown_host")
        if b"origin" in headers:  # a browser: pages may reach loopback, but not us
            raise ForbiddenError("requests from web pages are not allowed", code="origin")
        if is_open:
            return
        sent = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        # No token is not the empty one: an empty token file must not open the door.
        if not self._token or not hmac.compare_digest(sent, self._token):
            raise UnauthorizedError(
                "a valid token is required (Authorization: Bearer …)",
                hint="cat ~/.rbee/token",
            )


def _wrong_method(scope: Scope, others: list[str]) -> MethodNotAllowedError:
    return MethodNotAllowedError(
        f"{scope['path']} takes {', '.join(others)}, not {scope['method']}"
    )


def _hostname(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _match_parts(pattern: list[str], parts: list[str]) -> dict[str, str] | None:
    if len(pattern) != len(parts):
        return None
    params = {}
    for want, have in zip(pattern, parts, strict=True):
        if want.startswith("{"):
            params[want[1:-1]] = have
        elif want != have:
            return None
    return params


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def _send_response(answer: Response, send: Send) -> None:
    headers = [(b"content-length", str(len(answer.body)).encode()), *answer.headers]
    if answer.body:
        headers.append((b"content-type", answer.content_type))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _send_stream(answer: Stream, receive: Receive, send: Send) -> None:
    headers = [
        (b"content-type", sse.CONTENT_TYPE),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),
        *answer.headers,
    ]
    begun = False

    async def emit(chunk: bytes) -> None:
        nonlocal begun
        if not begun:
            begun = True
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": chunk, "more_body": True})

    refused: RbeeError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_on_disconnect, receive, nursery.cancel_scope)
        try:
            await answer.run(emit)
        except RbeeError as error:
            if begun:
                raise
            refused = error
        else:
            if not begun:
                await emit(b"")
            await send({"type": "http.response.body", "body": b""})
        nursery.cancel_scope.cancel(reason="stream finished")
    if refused is not None:
        await _send_response(error_response(refused), send)


async def _cancel_on_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel(reason="client disconnected")
