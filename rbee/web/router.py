"""A small ASGI application: routes, checks at the door, errors as JSON, watched streams."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeVar

import attrs
import trio

from rbee.errors import (
    BadInputError,
    NotFoundError,
    RbeeError,
    TooLargeError,
    TooManyFailuresError,
)
from rbee.hints import infer
from rbee.web.door import CORS, Door, Headers, is_preflight, one_each, peer_of
from rbee.wire import codec, messages, sse

log = logging.getLogger(__name__)

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Emit = Callable[[bytes], Awaitable[None]]

MAX_BODY = 32 << 20
ERROR_HEADERS: dict[int, Headers] = {
    401: ((b"www-authenticate", b"Bearer"),),
    429: ((b"retry-after", b"1"),),
    503: ((b"retry-after", b"1"),),
}


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
    headers: Headers = ()


@attrs.frozen
class Stream:
    """An answer that goes on: ``run(emit)`` is cancelled when the client goes away.

    The head is sent with the first chunk: an `RbeeError` before it becomes a plain error response.
    """

    run: Callable[[Emit], Awaitable[None]]
    headers: Headers = ()


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
    # A flood of them is answered, but does not fill the log.
    level = logging.DEBUG if isinstance(error, TooManyFailuresError) else logging.INFO
    log.log(level, "refused [%s]: %s: %s", detail.correlation_id, error.code, error)
    headers = ERROR_HEADERS.get(error.http_status, ())
    return Response(codec.dumps(messages.ErrorBody(detail)), error.http_status, headers=headers)


class App:
    """Routes of one daemon.

    Args:
        token: what ``Authorization: Bearer`` must carry on every route that is not open.
        hosts: names allowed in ``Host`` beside localhost and IP addresses.
        allowed_origins: the web pages that may call, as `checked_origin` returns them.
        fallback: takes what no route matches, after the same checks.
    """

    def __init__(
        self,
        *,
        token: str,
        hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        fallback: Any | None = None,
    ) -> None:
        self._door = Door(token, hosts, allowed_origins)
        self._routes: list[tuple[str, list[str], Handler, bool]] = []
        self.fallback = fallback

    def add(self, method: str, path: str, handler: Handler, *, is_open: bool = False) -> None:
        self._routes.append((method, path.strip("/").split("/"), handler, is_open))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: Response | Stream | None
        try:
            headers = one_each(scope["headers"])
            send = _sending(send, self._door.cors(headers))
            answer = await self._answer(scope, headers, receive, send)
        except RbeeError as error:
            answer = error_response(error)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            answer = error_response(RbeeError("internal error, see the log"))
        if isinstance(answer, Stream):
            await _send_stream(answer, receive, send)
        elif answer is not None:
            await _send_response(answer, send)

    async def _answer(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> Response | Stream | None:
        """Let the request in and return its answer; None if the fallback has sent it."""
        method, path = scope["method"], scope["path"]
        self._door.admit(headers)
        if is_preflight(method, headers):
            return Response(status=204, headers=CORS)
        route, others = self._match(method, path)
        if route is None or not route[2]:
            self._door.authorize(headers, peer_of(scope.get("client")))
        if route is not None:
            handler, params, _ = route
            return await handler(Request(method, path, params, headers, receive))
        if others:
            raise _wrong_method(scope, others)
        if self.fallback is None:
            raise NotFoundError(f"no route {method} {path}")
        await self.fallback(scope, receive, send)
        return None

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


def _wrong_method(scope: Scope, others: list[str]) -> MethodNotAllowedError:
    return MethodNotAllowedError(
        f"{scope['path']} takes {', '.join(others)}, not {scope['method']}"
    )


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


def _sending(send: Send, headers: Headers) -> Send:
    """Return ``send`` for answers that carry ``headers`` as well."""
    if not headers:
        return send

    async def send_with(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *headers]}
        await send(message)

    return send_with


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
