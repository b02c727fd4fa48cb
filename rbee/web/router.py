"""A small ASGI application: routes, checks at the door, errors as JSON, watched streams."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import attrs

from rbee.errors import (
    BadInputError,
    NotFoundError,
    QueueFullError,
    RateLimitedError,
    RbeeError,
    TooLargeError,
)
from rbee.hints import infer
from rbee.metrics import OTHER
from rbee.trace import REQUEST_ID, Elsewhere, Tracing, current, trace_of
from rbee.web.door import (
    CORS,
    Caller,
    Door,
    Headers,
    Keyring,
    is_preflight,
    one_each,
    with_key,
)
from rbee.web.out import STREAM, AsgiOut, Out, Receive, Send
from rbee.web.patience import Timely
from rbee.web.requests import CLIENT_GONE, Extra, Requests
from rbee.wire import codec, messages, sse

log = logging.getLogger(__name__)

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Emit = Callable[[bytes], Awaitable[None]]
Count = Callable[[int], object]
Gate = Callable[[], AbstractContextManager[Count]]
"""Counts a request while its body is read, and the bytes that have come; both raise if it is too
much."""

MAX_BODY = 32 << 20
POLITE = (QueueFullError, RateLimitedError)  # who is refused so has done nothing wrong
ERROR_HEADERS: dict[int, Headers] = {
    401: ((b"www-authenticate", b"Bearer"),),
    429: ((b"retry-after", b"1"),),
    503: ((b"retry-after", b"1"),),
}


class MethodNotAllowedError(RbeeError):
    code = "method_not_allowed"
    http_status = 405
    allow = ""


class UnsupportedMediaError(RbeeError):
    code = "unsupported_media"
    http_status = 415


def too_large() -> TooLargeError:
    return TooLargeError(
        f"a request has at most {MAX_BODY >> 20} MiB; this one is larger",
        hint=f"head -c 1000000 FILE | {infer(prompt='-')}",
    )


@attrs.define(eq=False)
class Request:
    """One request: ``params`` come from the route's ``{names}``.

    ``caller``: whose key it came with; None for the token. ``count`` is told of the bytes of the
    body as they come.
    """

    method: str
    path: str
    params: dict[str, str]
    headers: dict[bytes, bytes]
    _receive: Receive
    caller: Caller | None = None
    count: Count = bool

    async def body(self) -> bytes:
        """Read the whole body; at most `MAX_BODY` bytes, and not too slowly."""
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            with Elsewhere():
                message = await self._receive()
            if message["type"] == "http.disconnect":
                raise BadInputError("the body ended early")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MAX_BODY:
                raise too_large()
            self.count(len(parts[-1]))
            more = message.get("more_body", False)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read(self, kind: type[T]) -> T:
        """Read the body as JSON of the given wire class."""
        return codec.loads(await self.json(), kind)

    async def json(self) -> bytes:
        """Read the body, which says that it is JSON."""
        media = self.headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if media != b"application/json":
            raise UnsupportedMediaError("the body must be application/json")
        return await self.body()

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


@attrs.frozen
class Passing:
    """An answer that is had from elsewhere: ``run(out)`` is cancelled when the client goes away.

    An `RbeeError` before the head is sent becomes a plain error response.
    """

    run: Callable[[Out], Awaitable[None]]


Handler = Callable[[Request], Awaitable[Response | Stream | Passing]]
Refuse = Callable[[RbeeError], Response]


@attrs.frozen
class Asked:
    """One request as it came.

    Attributes:
        client: its address and port.
        skip: drops what has come of its body.
    """

    method: str
    path: str
    headers: Sequence[tuple[bytes, bytes]]
    client: Any
    receive: Receive
    skip: Callable[[], object] = bool


def json_response(message: Any, status: int = 200) -> Response:
    return Response(codec.dumps(message), status)


def error_response(error: RbeeError) -> Response:
    detail = messages.ErrorDetail(
        code=error.code,
        message=error.message,
        hint=error.hint,
        details=error.details,
        correlation_id=note_refusal(error),
    )
    return refusal(error, codec.dumps(messages.ErrorBody(detail)))


def note_refusal(error: RbeeError) -> str:
    """Log an error that is told to a client; return what both are found by: the request's id."""
    trace = current()
    trace.error = error.code
    # A flood of them is answered, but does not fill the log.
    level = logging.DEBUG if error.http_status == 429 else logging.INFO
    log.log(level, "refused [%s]: %s: %s", trace.id, error.code, error)
    return trace.id


def refusal(error: RbeeError, body: bytes) -> Response:
    """Make the answer that tells an error in words of the caller's."""
    headers = ERROR_HEADERS.get(error.http_status, ())
    if isinstance(error, MethodNotAllowedError):
        headers = ((b"allow", error.allow.encode()),)
    if isinstance(after := error.details.get("retry_after"), int | float):
        headers = ((b"retry-after", b"%d" % math.ceil(after)),)
    return Response(body, error.http_status, headers=headers)


@attrs.frozen
class Route:
    """One route of an `App`.

    Attributes:
        is_open: whether it needs no token.
        is_data: whether it may be served without the server for everything.
        takes_key: whether the token may come as ``x-api-key``.
        for_keys: whether named keys open it too.
        refuse: makes the answers to what is refused.
    """

    method: str
    parts: tuple[str, ...]
    handler: Handler
    is_open: bool = False
    is_data: bool = False
    takes_key: bool = False
    for_keys: bool = False
    refuse: Refuse = error_response


Found = tuple[tuple[Route, dict[str, str]] | None, list[str]]
"""A route with the parameters in the path; without one, the methods that the path does take."""


def name_of(found: tuple[Route, dict[str, str]] | None) -> str:
    """Return how a route is called in figures; one name for all that is none of ours."""
    return OTHER if found is None else "/" + "/".join(found[0].parts)


class App:
    """Routes of one daemon.

    Args:
        token: what ``Authorization: Bearer`` must carry on every route that is not open.
        hosts: names allowed in ``Host`` beside localhost and IP addresses.
        allowed_origins: the web pages that may call, as `checked_origin` returns them.
        fallback: takes what no route matches, after the same checks.
        keys: finds the named keys, which open the routes that are for them.
        gate: decides on the head whether the body of a request for a data route is read.
        tells_overhead: whether answers of data routes carry `OVERHEAD`: the milliseconds until
            they began that it took itself.

    Attributes:
        requests: counts what it has answered.
    """

    def __init__(
        self,
        *,
        token: str,
        hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        fallback: Any | None = None,
        tells_overhead: bool = False,
        keys: Keyring | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._door = Door(token, hosts, allowed_origins, keys)
        self._gate = gate
        self._routes: list[Route] = []
        self._data: dict[tuple[str, str], Route] = {}
        self._data_patterns: list[Route] = []
        self.fallback = fallback
        self.requests = Requests()
        self._tells_overhead = tells_overhead

    def add(self, method: str, path: str, handler: Handler, **options: Any) -> None:
        """Add a route; ``options`` are those of `Route`."""
        route = Route(method, tuple(path.strip("/").split("/")), handler, **options)
        self._routes.append(route)
        if route.is_data and "{" in path:
            self._data_patterns.append(route)
        elif route.is_data:
            self._data[method, path] = route

    def has_data(self, method: str, path: str) -> bool:
        """Tell whether a request is for a data route, spelled as it was added."""
        return (method, path) in self._data or any(
            route.method == method and _match_parts(route.parts, path[1:].split("/")) is not None
            for route in self._data_patterns
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        out, timely = AsgiOut(receive, send), Timely(receive)

        async def fall_back() -> None:
            assert self.fallback is not None
            with timely.scope:
                await self.fallback(scope, timely.or_cancel, _sending(send, out))
            if timely.ran_out is not None and not out.status:
                raise timely.ran_out

        asked = Asked(scope["method"], scope["path"], scope["headers"], scope.get("client"), timely)
        await self.respond(asked, out, None if self.fallback is None else fall_back)

    async def respond(
        self, asked: Asked, out: Out, fall_back: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Answer one request; ``fall_back`` takes what no route matches."""
        found = self._match(asked.method, asked.path)
        trace = trace_of(asked.headers)
        with Tracing(trace), self.requests.counted(name_of(found[0]), trace, out):
            told = self._tells_overhead and found[0] is not None and found[0][0].is_data
            out.extra = extra = Extra(trace, told)
            await self._respond(asked, out, extra, found, fall_back)

    async def _respond(
        self, asked: Asked, out: Out, extra: Extra, found: Found,
        fall_back: Callable[[], Awaitable[None]] | None,
    ) -> None:  # fmt: skip
        answer: Response | Stream | Passing | None
        route, others = found
        refuse = error_response if route is None else route[0].refuse
        with ExitStack() as held, ExitStack() as reading:
            try:
                headers = one_each(asked.headers)
                extra.cors = self._door.cors(headers)
                request = self._let_in(asked, headers, route, held, reading)
                answer = await self._answer(asked, request, route, others, fall_back)
            except RbeeError as error:
                if isinstance(error, POLITE):
                    asked.skip()
                answer = refuse(error)
            except Exception:
                log.exception("%s %s failed", asked.method, asked.path)
                answer = refuse(RbeeError("internal error, see the log"))
            reading.close()
            if isinstance(answer, Response):
                await _send_response(answer, out)
            elif answer is not None:
                await _send_going(answer, out, refuse)

    def _let_in(
        self,
        asked: Asked,
        headers: dict[bytes, bytes],
        found: tuple[Route, dict[str, str]] | None,
        held: ExitStack,
        reading: ExitStack,
    ) -> Request:
        """Check the head; ``held`` and ``reading`` get what counts it, to its end and so long."""
        self._door.admit(headers)
        request = Request(asked.method, asked.path, {}, headers, asked.receive)
        if is_preflight(asked.method, headers):
            return request
        route = None if found is None else found[0]
        if route is None or not route.is_open:
            sent = with_key(headers) if route is not None and route.takes_key else headers
            for_keys = route is not None and route.for_keys
            request.caller = self._door.authorize(sent, asked.client, for_keys=for_keys)
        if route is not None and route.is_data and asked.method == "POST":
            if request.caller is not None:  # first: his own bound keeps him from taking all places
                held.enter_context(request.caller.using())
            if self._gate is not None:
                request.count = reading.enter_context(self._gate())
        return request

    async def _answer(
        self,
        asked: Asked,
        request: Request,
        found: tuple[Route, dict[str, str]] | None,
        others: Sequence[str],
        fall_back: Callable[[], Awaitable[None]] | None,
    ) -> Response | Stream | Passing | None:
        """Return a request's answer; None if the fallback has sent it."""
        if is_preflight(asked.method, request.headers):
            return Response(status=204, headers=CORS)
        if found is not None:
            route, request.params = found
            return await route.handler(request)
        if others:
            raise _wrong_method(asked, others)
        if fall_back is None:
            raise NotFoundError(f"no route {asked.method} {asked.path}")
        await fall_back()
        return None

    def _match(self, method: str, path: str) -> Found:
        if (data := self._data.get((method, path))) is not None:
            return (data, {}), []
        parts = path.strip("/").split("/")
        others: list[str] = []
        for route in self._routes:
            params = _match_parts(route.parts, parts)
            if params is None:
                continue
            if route.method == method:
                return (route, params), []
            others.append(route.method)
        return None, others


def _wrong_method(asked: Asked, others: Sequence[str]) -> MethodNotAllowedError:
    error = MethodNotAllowedError(f"{asked.path} takes {', '.join(others)}, not {asked.method}")
    error.allow = ", ".join(others)
    return error


def _match_parts(pattern: Sequence[str], parts: list[str]) -> dict[str, str] | None:
    if len(pattern) != len(parts):
        return None
    params = {}
    for want, have in zip(pattern, parts, strict=True):
        if want.startswith("{"):
            params[want[1:-1]] = have
        elif want != have:
            return None
    return params


def _sending(send: Send, out: Out) -> Send:
    """Return ``send`` for an answer that is not ours; it carries what all answers do."""

    async def send_with(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            out.status = message["status"]
            theirs = [pair for pair in message["headers"] if pair[0].lower() != REQUEST_ID]
            message = {**message, "headers": [*theirs, *out.extra]}
        await send(message)

    return send_with


async def _send_response(answer: Response, out: Out) -> None:
    headers = answer.headers
    if answer.body:
        headers = (*headers, (b"content-type", answer.content_type))
    await out.whole(answer.status, headers, answer.body)


async def _send_going(answer: Stream | Passing, out: Out, refuse: Refuse) -> None:
    refused: RbeeError | None = None
    trace, is_over = current(), False
    try:
        async with out.watching():
            refused = await _run_going(answer, out)
            is_over = True
    finally:
        if out.is_lost and not (is_over or trace.error or trace.is_told):
            trace.error = CLIENT_GONE
    if refused is not None:
        await _send_response(refuse(refused), out)


async def _run_going(answer: Stream | Passing, out: Out) -> RbeeError | None:
    """Run an answer; return the error that is to be told instead, if it had not begun."""
    try:
        if isinstance(answer, Passing):
            await answer.run(out)
        else:
            await _run_stream(answer, out)
    except RbeeError as error:
        if out.begun:
            current().error = error.code
            raise
        return error
    except Exception:
        if out.begun:
            current().error = RbeeError.code
            raise
        log.exception("an answer failed before it had begun")
        return RbeeError("internal error, see the log")
    return None


async def _run_stream(answer: Stream, out: Out) -> None:
    async def emit(chunk: bytes) -> None:
        if not out.begun:
            await out.begin(200, (*STREAM, *answer.headers))
        await out.emit(chunk)

    await answer.run(emit)
    if not out.begun:
        await emit(b"")
    await out.end()
