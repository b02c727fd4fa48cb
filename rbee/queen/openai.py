"""The routes of OpenAI's and Anthropic's APIs: passed through to a worker that has the model.

What such a request says is the worker's business: of its body only ``model``, ``stream`` and
``priority`` are looked at, and the bytes go untouched both ways.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial

import attrs
import msgspec
import trio

from rbee.errors import (
    BadInputError,
    RbeeError,
    UnavailableError,
)
from rbee.queen.aliases import Aliases
from rbee.queen.asking import STALL, ask_at, open_answer
from rbee.queen.assignments import Assignments
from rbee.queen.hive import Hive
from rbee.queen.keys import key_of
from rbee.queen.limits import LONGEST_NAME
from rbee.queen.offer import Offer
from rbee.queen.placement import GENERATE
from rbee.queen.sessions import session_of
from rbee.queen.shapes import ANTHROPIC, OPENAI, Shape
from rbee.queen.tries import ask_until_answered
from rbee.queen.waiting_room import Terms
from rbee.trace import REQUEST_ID, current
from rbee.web.head import Headers, end_to_end
from rbee.web.out import Out, read_all
from rbee.web.router import App, Passing, Request, Response
from rbee.web.upstream import Answer, Upstreams
from rbee.wire.messages import Narration, StartWorker, WorkerInfo

log = logging.getLogger(__name__)

EMBEDDINGS = "/v1/embeddings"
ANY_TASK = ("/tokenize", "/detokenize")
ROUTES = ("/v1/chat/completions", "/v1/completions", EMBEDDINGS, "/v1/responses", *ANY_TASK)
ANTHROPIC_ROUTES = ("/v1/messages", "/v1/messages/count_tokens")
NO_WORK = (*ANY_TASK, "/v1/messages/count_tokens")  # the engine has no part in them
MODELS = "/v1/models"
EMBED = "embed"

BIG = 1 << 20  # bytes of a body beyond which it is decoded in a thread
NO_REQUEST = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# A worker is not there any more, or will not be; another may have its port and refuse our token.
GONE = frozenset({"unauthorized", "too_many_failures", "other_worker"})
LEAVING = frozenset({"worker_stopping", "worker_failed", "worker_stopped", "starting"})
# Of this client and this connection, not for the worker. Its answer must not be compressed.
KEPT_BACK = frozenset(
    {b"host", b"authorization", b"x-api-key", b"cookie", b"origin", b"referer", b"expect",
     b"accept-encoding", b"x-rbee-worker-id", REQUEST_ID}
)  # fmt: skip

RENEWED = frozenset({REQUEST_ID})  # in an answer: it carries ours


class Envelope(msgspec.Struct):
    """What is looked at in a request."""

    model: str = ""
    stream: bool | None = None
    priority: int | None = None


@attrs.frozen
class Call:
    """One request to be passed on."""

    path: str
    headers: Headers
    body: bytes
    start: StartWorker
    streams: bool
    shape: Shape
    id: bytes
    terms: Terms


class WorkerGoneError(UnavailableError):
    """It was not there, or takes nothing new: nothing of the request was done."""

    code = "worker_gone"


class Passages:
    """All requests of one queen that are passed on; they end when the body of `open` does."""

    def __init__(
        self,
        assignments: Assignments,
        aliases: Aliases,
        offer: Offer,
        upstreams: Upstreams,
        ending: Callable[[], RbeeError],
    ) -> None:
        self._assignments = assignments
        self._aliases = aliases
        self._offer = offer
        self._upstreams = upstreams
        self._ending = ending
        self._is_open = False
        self._running: set[trio.CancelScope] = set()

    def __len__(self) -> int:
        return len(self._running)

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        """Take requests while the body runs; then each that is open is told of the end."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            for scope in self._running:
                scope.cancel(reason="the queen stops")

    async def models(self, request: Request) -> Response:
        """List what can be asked for."""
        now, key = int(time.time()), key_of(request.caller)
        items = [
            {"id": name, "object": "model", "created": now, "owned_by": "rbee"}
            for name in await self._offer.names()
            if key is None or key.may_use(name, self._aliases.meanings)
        ]
        return Response(json.dumps({"object": "list", "data": items}).encode())

    async def take(self, request: Request, *, shape: Shape) -> Passing:
        """Read a request and say how it is answered."""
        body = await request.json()
        asked = await decode(body)
        if not asked.model:
            raise BadInputError("the request names no model", param="model")
        if len(asked.model) > LONGEST_NAME:
            raise BadInputError("the name of the model is too long", param="model")
        if (key := key_of(request.caller)) is not None:
            key.check_model(asked.model, self._aliases.meanings)
        call = Call(
            request.path,
            end_to_end(tuple(request.headers.items()), without=KEPT_BACK),
            body,
            await self._start(request.path, asked.model),
            bool(asked.stream),
            shape,
            current().id.encode(),
            Terms(
                asked.priority or 0,
                session_of(request),
                takes_slot=request.path not in NO_WORK,
                size=len(body),
            ),
        )
        return Passing(partial(self._run, call))

    async def _start(self, path: str, model: str) -> StartWorker:
        """Say which worker is wanted, and what to start if there is none.

        Raises:
            NotFoundError: the name means nothing.
            ConfigError: config.toml is wrong.
        """
        served = self._assignments.served(model)
        if served is None:
            await self._offer.check(model)
        task = EMBED if path == EMBEDDINGS else GENERATE
        if served is not None and path in ANY_TASK:
            task = served.task
        start = StartWorker(model, engine=served.engine if served else "", task=task)
        return self._aliases.fill_start(start)

    async def _run(self, call: Call, out: Out) -> None:
        """Answer; what goes wrong once the answer has begun is its last event."""
        if not self._is_open:
            raise self._ending()
        error: RbeeError | None = None
        with trio.CancelScope() as scope:
            self._running.add(scope)
            try:
                await self._pass(call, out)
            except RbeeError as exc:
                error = exc
            finally:
                self._running.discard(scope)
        if scope.cancelled_caught:
            error = self._ending()
        if error is None:
            return
        if not out.begun:
            raise error
        current().error = error.code
        log.info("%s: %s: %s", call.path, error.code, error)
        await out.end_with(call.shape.event(error))

    async def _pass(self, call: Call, out: Out) -> None:
        ask = partial(self._pass_from, call, out)
        await ask_until_answered(
            self._assignments, call.start, _say_nothing, ask, lambda: out.begun, call.terms
        )

    async def _pass_from(self, call: Call, out: Out, worker: WorkerInfo) -> None:
        ask = partial(self._ask, worker, call, out)
        await ask_at(self._assignments, worker, ask, lambda: out.begun)

    async def _ask(self, worker: WorkerInfo, call: Call, out: Out, hive: Hive) -> None:
        silence = STALL if call.streams else float("inf")
        headers = ((REQUEST_ID, call.id), *call.headers)
        body = call.body
        if len(body) < BIG:
            body = for_worker(body, call.start.model, worker)
        else:
            body = await trio.to_thread.run_sync(for_worker, body, call.start.model, worker)
        asking = open_answer(self._upstreams, hive, worker, call.path, headers, body, silence)
        async with asking as answer:
            await self._answer(call, answer, out, silence)

    async def _answer(self, call: Call, answer: Answer, out: Out, silence: float) -> None:
        headers = end_to_end(answer.head.headers, without=RENEWED)
        figures = self._assignments.figures
        pace = figures.pace(answer)
        if call.streams:
            headers = (*headers, (b"x-accel-buffering", b"no"))
        if answer.head.status not in (401, 409, 429, 503):
            try:
                await out.pass_on(answer, headers, silence=silence)
            finally:
                figures.take_end(pace)
            return
        body = await read_all(answer)
        if (code := _code(body)) in GONE | LEAVING:
            raise WorkerGoneError(f"the worker takes nothing: {code}")
        await out.whole(answer.head.status, headers, body)


async def decode(body: bytes) -> Envelope:
    """Look at what a request asks for.

    Raises:
        BadInputError: it is no JSON object, or a field that is looked at is of a wrong type.
    """
    try:
        if len(body) < BIG:
            return msgspec.json.decode(body, type=Envelope)
        return await trio.to_thread.run_sync(partial(msgspec.json.decode, body, type=Envelope))
    except NO_REQUEST as exc:
        raise BadInputError(f"the body is not a request: {exc}") from exc


def for_worker(body: bytes, model: str, worker: WorkerInfo) -> bytes:
    """Return the body as a worker understands it: untouched, unless it has another name for that.

    Then the name alone is replaced; of several that mean the same model it may know just some.
    """
    if model in (worker.model, *worker.served_names):
        return body
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except NO_REQUEST as exc:
        raise BadInputError(f"the body is not a request: {exc}") from exc
    fields["model"] = msgspec.Raw(msgspec.json.encode(worker.model))
    return msgspec.json.encode(fields)


def _code(body: bytes) -> str:
    """Return the code of an error of ours; "" of any other answer."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""


def _say_nothing(narration: Narration) -> None:
    pass


def add_openai_routes(app: App, passages: Passages) -> None:
    add = partial(app.add, is_data=True, takes_key=True, for_keys=True)
    add("GET", MODELS, passages.models, refuse=OPENAI.refuse)
    for paths, shape in ((ROUTES, OPENAI), (ANTHROPIC_ROUTES, ANTHROPIC)):
        for path in paths:
            add("POST", path, partial(passages.take, shape=shape), refuse=shape.refuse)
