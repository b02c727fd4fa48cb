"""OpenAI's routes of the echo engine, as vLLM has them: enough for a client to chat with it."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import attrs
import trio

from rbee.errors import BadInputError, NotFoundError, RbeeError, leaves
from rbee.model import new_id
from rbee.wire.messages import ExecuteRequest, Message

if TYPE_CHECKING:
    from rbee.testing.echo_engine import EchoEngine

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@attrs.frozen
class Shape:
    """How one route answers: the names of its objects, and where the text is in a choice."""

    whole: str
    piece: str
    prefix: str
    text_of_whole: Callable[[str], dict[str, Any]]
    text_of_piece: Callable[[str], dict[str, Any]]


SHAPES = {
    "/v1/chat/completions": Shape(
        "chat.completion", "chat.completion.chunk", "chatcmpl",
        lambda text: {"message": {"role": "assistant", "content": text}},
        lambda text: {"delta": {"role": "assistant", "content": text}},
    ),
    "/v1/completions": Shape(
        "text_completion", "text_completion", "cmpl",
        lambda text: {"text": text}, lambda text: {"text": text},
    ),
}  # fmt: skip


@attrs.frozen
class Asked:
    """One request, taken apart."""

    shape: Shape
    request: ExecuteRequest
    model: str
    is_stream: bool
    wants_usage: bool


class EchoApi:
    """An ASGI application, for trio."""

    def __init__(self, engine: EchoEngine, names: tuple[str, ...]) -> None:
        self._engine = engine
        self._names = names

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        refusal: RbeeError | None = None
        try:
            if (scope["method"], scope["path"]) == ("GET", "/v1/models"):
                await _send_json(send, 200, self._models())
            else:
                await self._answer(_asked(scope, await _body(receive)), receive, send)
        except* (BadInputError, NotFoundError) as group:  # raised before anything is sent
            refusal = next(leaf for leaf in leaves(group) if isinstance(leaf, RbeeError))
        if refusal is not None:
            await _send_json(send, refusal.http_status, _refused(refusal))

    def _models(self) -> dict[str, Any]:
        models = [{"id": name, "object": "model", "owned_by": "rbee"} for name in self._names]
        return {"object": "list", "data": models}

    async def _answer(self, asked: Asked, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_disconnect, receive, nursery.cancel_scope)
            await (self._stream if asked.is_stream else self._whole)(asked, send)
            nursery.cancel_scope.cancel(reason="answered")

    async def _whole(self, asked: Asked, send: Send) -> None:
        async with self._engine.generate(asked.request) as generation:
            chunks = [chunk async for step in generation for chunk in step]
        text = "".join(chunk.text for chunk in chunks)
        choice = asked.shape.text_of_whole(text) | {"finish_reason": chunks[-1].finish}
        usage = _usage(generation.tokens_in, len(chunks))
        await _send_json(send, 200, _object(asked, asked.shape.whole, [choice]) | usage)

    async def _stream(self, asked: Asked, send: Send) -> None:
        async with self._engine.generate(asked.request) as generation:
            await send(_head(200, b"text/event-stream; charset=utf-8"))
            told = _object(asked, asked.shape.piece, [])
            count = 0
            async for step in generation:
                for chunk in step:
                    count += 1
                    choice = asked.shape.text_of_piece(chunk.text)
                    choice |= {"index": 0, "finish_reason": chunk.finish}
                    await _send_event(send, told | {"choices": [choice]})
        if asked.wants_usage:
            await _send_event(send, told | _usage(generation.tokens_in, count))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _asked(scope: MutableMapping[str, Any], body: bytes) -> Asked:
    shape = SHAPES.get(scope["path"]) if scope["method"] == "POST" else None
    if shape is None:
        raise NotFoundError(f"the echo engine has no {scope['method']} {scope['path']}")
    try:
        said = json.loads(body)
        messages = tuple(Message(one["role"], _text(one)) for one in said.get("messages", ()))
        request = ExecuteRequest(
            new_id("echo"),
            prompt=None if messages else str(said.get("prompt", "")),
            messages=messages or None,
            max_tokens=said.get("max_completion_tokens") or said.get("max_tokens"),
        )
        wants_usage = bool((said.get("stream_options") or {}).get("include_usage"))
        return Asked(shape, request, str(said["model"]), bool(said.get("stream")), wants_usage)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadInputError(f"not a request of {scope['path']}: {exc!r}") from exc


def _refused(error: RbeeError) -> dict[str, Any]:
    kind = "NotFoundError" if error.http_status == 404 else "BadRequestError"
    told = {"message": error.message, "type": kind, "param": None, "code": error.http_status}
    return {"error": told}


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def _object(asked: Asked, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    for index, choice in enumerate(choices):
        choice["index"] = index
    job = asked.request.job_id.partition("-")[2]
    return {
        "id": f"{asked.shape.prefix}-{job}", "object": kind, "created": int(time.time()),
        "model": asked.model, "choices": choices,
    }  # fmt: skip


def _usage(tokens_in: int, tokens_out: int) -> dict[str, Any]:
    total = tokens_in + tokens_out
    counts = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": total}
    return {"usage": counts}


# HTTP -----------------------------------------------------------------------------------------
async def _body(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def _cancel_on_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel(reason="client disconnected")


def _head(status: int, media: bytes) -> dict[str, Any]:
    headers = [(b"content-type", media)]
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _send_json(send: Send, status: int, what: object) -> None:
    body = json.dumps(what).encode()
    head = _head(status, b"application/json")
    head["headers"].append((b"content-length", b"%d" % len(body)))
    await send(head)
    await send({"type": "http.response.body", "body": body})


async def _send_event(send: Send, what: object) -> None:
    body = b"data: " + json.dumps(what).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})
