"""Checks at the door, and every refusal as JSON; in memory, without a server."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from rbee.errors import ConflictError, QueueFullError, RateLimitedError, UnavailableError
from rbee.web import router
from rbee.web.patience import SILENCE
from rbee.web.router import App, Count, Emit, Gate, Request, Response, Stream, json_response
from rbee.wire.messages import Message

TOKEN = "secret"
JSON = {"content-type": "application/json"}


@attrs.define
class Answer:
    status: int = 0
    headers: dict[bytes, bytes] = attrs.field(factory=dict)
    body: bytes = b""
    ended: bool = False

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


@attrs.define
class Call:
    """One request in memory; the client goes away when ``left`` is set."""

    app: App
    parts: list[bytes]
    answer: Answer = attrs.field(factory=Answer)
    left: trio.Event = attrs.field(factory=trio.Event)
    more: list[tuple[bytes, bytes]] = attrs.field(factory=list)

    async def run(
        self, method: str, path: str, headers: dict[str, str], peer: str = "127.0.0.1"
    ) -> Answer:
        path, _, query = path.partition("?")
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        scope = {
            "type": "http", "method": method, "path": path, "headers": raw + self.more,
            "query_string": query.encode("latin-1"), "client": (peer, 50_000),
        }  # fmt: skip
        await self.app(scope, self.receive, self.send)
        return self.answer

    async def receive(self) -> dict[str, Any]:
        if self.parts:
            part = self.parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.parts)}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            self.answer.status = message["status"]
            self.answer.headers = dict(message["headers"])
        else:
            self.answer.body += message["body"]
            self.answer.ended = not message.get("more_body", False)


async def ask(app: App, method: str, path: str, *parts: bytes, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    own = {"host": "localhost:8080", "authorization": f"Bearer {TOKEN}", **named}
    return await Call(app, [*parts] or [b""]).run(method, path, own)


async def hello(request: Request) -> Response:
    return json_response({"params": request.params})


async def read(request: Request) -> Response:
    return json_response(await request.read(Message), 201)


def make(**options: Any) -> App:
    app = App(token=TOKEN, **options)
    app.add("GET", "/v1/workers", hello)
    app.add("POST", "/v1/workers", read)
    app.add("DELETE", "/v1/workers/{worker}/jobs/{job}", hello)
    app.add("GET", "/health", hello, is_open=True)
    return app


async def test_a_route_gets_its_parameters_whatever_the_query() -> None:
    answer = await ask(make(), "DELETE", "/v1/workers/w1/jobs/j1?a=1&c=%ff")
    assert answer.status == 200
    assert json.loads(answer.body)["params"] == {"worker": "w1", "job": "j1"}
    assert answer.headers[b"content-type"] == b"application/json"
    assert answer.headers[b"content-length"] == str(len(answer.body)).encode()


def test_a_data_route_may_have_parameters() -> None:
    app = make()
    app.add("GET", "/v2/tasks/{job}/events", hello, is_data=True)
    app.add("POST", "/v2/tasks", read, is_data=True)
    assert app.has_data("GET", "/v2/tasks/job-1/events")
    assert app.has_data("POST", "/v2/tasks")
    for other in ("/v2/tasks/job-1", "/v2/tasks/job-1/events/", "/health"):
        assert not app.has_data("GET", other)
    assert not app.has_data("DELETE", "/v2/tasks/job-1/events")


async def test_an_unknown_path_is_404() -> None:
    answer = await ask(make(), "GET", "/v1/nothing")
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert answer.error["message"] == "no route GET /v1/nothing"
    assert answer.error["correlation_id"]


@pytest.mark.parametrize(
    "given", ["mine", "0af7651916cd43dd8448eb211c80319c", "a.b_c~d:e/f+g=h@i-j"]
)
async def test_an_answer_has_the_id_that_the_request_came_with(given: str) -> None:
    for path in ("/v1/workers", "/v1/nothing"):
        answer = await ask(make(), "GET", path, x_request_id=given)
        assert answer.headers[b"x-request-id"] == given.encode()
    assert answer.error["correlation_id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\xe9", '"', "a,b"])
async def test_an_id_that_will_not_do_is_replaced(given: str) -> None:
    answer = await ask(make(), "GET", "/v1/nothing", x_request_id=given)
    made = answer.headers[b"x-request-id"].decode()
    assert made.startswith("req-")
    assert answer.error["correlation_id"] == made
    other = await ask(make(), "GET", "/v1/nothing", x_request_id=given)
    assert other.headers[b"x-request-id"].decode() != made


async def test_what_another_app_answers_has_our_id_and_status_in_the_figures() -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"x-request-id", b"theirs")]
        await send({"type": "http.response.start", "status": 418, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    app = make(fallback=other)
    answer = await ask(app, "GET", "/v1/nothing", x_request_id="mine")
    assert (answer.status, answer.headers[b"x-request-id"]) == (418, b"mine")
    assert ended(app) == {("other", "418", ""): 1}


async def test_requests_are_counted_by_what_they_came_to() -> None:
    async def run(emit: Emit) -> None:
        await emit(b"a")
        if breaks:
            raise UnavailableError("gone", code="worker_died")
        await trio.sleep_forever()

    async def stream(request: Request) -> Stream:
        return Stream(run)

    app = make()
    app.add("GET", "/stream/{id}", stream)
    await ask(app, "GET", "/v1/workers")
    await ask(app, "GET", "/v1/workers", authorization="no")
    breaks = True
    with pytest.RaisesGroup(UnavailableError, flatten_subgroups=True):
        await ask(app, "GET", "/stream/1")
    breaks = False
    async with trio.open_nursery() as nursery:
        call = Call(app, [b""])
        headers = {"host": "localhost", "authorization": f"Bearer {TOKEN}"}
        nursery.start_soon(call.run, "GET", "/stream/2", headers)
        await wait_all_tasks_blocked()
        call.left.set()
    assert ended(app) == {
        ("/v1/workers", "200", ""): 1, ("/v1/workers", "401", "unauthorized"): 1,
        ("/stream/{id}", "200", "worker_died"): 1, ("/stream/{id}", "200", "client_gone"): 1,
    }  # fmt: skip


def ended(app: App) -> dict[tuple[str, ...], int]:
    return dict(app.requests._ended)


async def test_a_path_with_other_methods_is_405_and_names_them() -> None:
    answer = await ask(make(), "PUT", "/v1/workers")
    assert answer.status == 405
    assert answer.error["message"] == "/v1/workers takes GET, POST, not PUT"


@pytest.mark.parametrize(
    "sent",
    ["", "Bearer wrong", "Bearer ", f"Bearer {TOKEN}x", f"Bearer  {TOKEN}", TOKEN,
     f"Basic {TOKEN}", "Bearer \xff", "Bearer " + "x" * 60_000],
    ids=lambda value: value[:10],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/workers", "/nothing"])
async def test_without_the_token_every_path_is_401(sent: str, path: str) -> None:
    answer = await ask(make(), "GET", path, authorization=sent)
    assert (answer.status, answer.error["code"]) == (401, "unauthorized")
    assert answer.headers[b"www-authenticate"] == b"Bearer"
    assert (await ask(make(), "PUT", path, authorization=sent)).status == 401
    assert TOKEN not in answer.body.decode()


async def test_the_scheme_of_the_token_is_taken_in_any_case() -> None:
    answer = await ask(make(), "GET", "/v1/workers", authorization=f"bearer {TOKEN}")
    assert answer.status == 200


@pytest.mark.parametrize("sent", ["", "Bearer ", "Bearer x"])
async def test_an_app_without_a_token_lets_nobody_in(sent: str) -> None:
    app = App(token="")
    app.add("GET", "/v1/workers", hello)
    assert (await ask(app, "GET", "/v1/workers", authorization=sent)).status == 401


async def test_an_open_route_needs_no_token_but_the_right_host() -> None:
    assert (await ask(make(), "GET", "/health", authorization="")).status == 200
    answer = await ask(make(), "GET", "/health", authorization="", host="evil.example")
    assert answer.status == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:1", 200), ("127.0.0.1:8080", 200), ("[::1]:8080", 200),
        ("[::1]", 200), ("node-1:9200", 200), ("NODE-1", 200), ("10.77.0.2:9200", 200),
        ("192.0.2.1", 200), ("[fd00::1]:9200", 200), ("[fe80::1%25eth0]:9200", 200),
        ("", 403), ("evil.example:8080", 403), ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:80", 403), ("node-2", 403), ("localhost:8080@evil.example", 403),
        ("evil.example@localhost", 403), ("10.77.0.2:9200:80", 403), ("[::1]evil.example", 403),
        ("[evil.example]", 403), ("[10.77.0.2]", 403), ("fd00::1", 403), ("0x7f.1", 403),
        (":8080", 403), ("[]", 403), ("localhost:80a", 403), ("localhost ", 403), ("\xff", 403),
        ("x" * 60_000, 403),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
async def test_only_our_own_names_and_addresses_are_taken_as_host(host: str, status: int) -> None:
    answer = await ask(make(hosts=["Node-1", ""]), "GET", "/v1/workers", host=host)
    assert answer.status == status
    if status == 403:
        assert answer.error["code"] == "unknown_host"
        assert len(answer.body) < 1000


@pytest.mark.parametrize("origin", ["http://localhost:8080", "null", "https://evil.example", ""])
async def test_any_origin_is_403(origin: str) -> None:
    answer = await ask(make(), "GET", "/health", origin=origin)
    assert (answer.status, answer.error["code"]) == (403, "origin")


async def test_a_body_is_read_as_its_class_in_any_parts() -> None:
    parts = [b'{"role": "us', b"", b'er", "content": "hi"}']
    answer = await ask(make(), "POST", "/v1/workers", *parts, **JSON)
    assert (answer.status, json.loads(answer.body)["content"]) == (201, "hi")
    media = {"content_type": "Application/JSON; charset=utf-8"}
    assert (await ask(make(), "POST", "/v1/workers", b"".join(parts), **media)).status == 201


@pytest.mark.parametrize("media", ["", "text/plain", "application/x-www-form-urlencoded"])
async def test_a_body_that_is_not_json_by_its_type_is_415(media: str) -> None:
    answer = await ask(make(), "POST", "/v1/workers", b"{}", content_type=media)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media")


async def test_a_body_that_is_too_large_is_413(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "MAX_BODY", 10)
    answer = await ask(make(), "POST", "/v1/workers", b"123456", b"78901", b"more", **JSON)
    assert (answer.status, answer.error["code"]) == (413, "too_large")


async def test_a_wrong_body_is_400_and_names_the_fields() -> None:
    answer = await ask(make(), "POST", "/v1/workers", b'{"role": 5, "text": ""}', **JSON)
    assert (answer.status, answer.error["code"]) == (400, "bad_input")
    assert all(name in answer.error["message"] for name in ("role", "content", "text"))


async def test_an_error_of_ours_becomes_its_status_and_body() -> None:
    async def refuse(request: Request) -> Response:
        raise ConflictError("taken", hint="try --port 0", code="port_taken", port=80)

    app = make()
    app.add("GET", "/refuse", refuse)
    answer = await ask(app, "GET", "/refuse")
    error = answer.error
    assert (answer.status, error.pop("correlation_id") != "") == (409, True)
    assert error == {
        "code": "port_taken", "message": "taken", "hint": "try --port 0", "details": {"port": 80},
    }  # fmt: skip
    assert b"retry-after" not in answer.headers


async def test_what_is_not_available_now_says_when_to_retry() -> None:
    async def refuse(request: Request) -> Response:
        raise UnavailableError("starting")

    app = make()
    app.add("GET", "/refuse", refuse)
    assert (await ask(app, "GET", "/refuse")).headers[b"retry-after"] == b"1"


async def test_a_wait_of_parts_of_a_second_is_told_in_whole_ones() -> None:
    async def refuse(request: Request) -> Response:
        raise UnavailableError("failed twice", retry_after=3.2)

    app = make()
    app.add("GET", "/refuse", refuse)
    assert (await ask(app, "GET", "/refuse")).headers[b"retry-after"] == b"4"


# on the head ----------------------------------------------------------------------------------
@attrs.define(eq=False)
class OneKey:
    """A keyring with one key, which counts its requests."""

    name: str = "bee"
    running: int = 0

    def find(self, sent: bytes) -> OneKey | None:
        return self if sent == b"bee's" else None

    @contextmanager
    def using(self) -> Iterator[None]:
        if self.running:
            raise RateLimitedError("too many", retry_after=7)
        self.running += 1
        yield
        self.running -= 1


NO_GATE: Gate = partial(nullcontext, bool)


def make_gated(key: OneKey, gate: Gate, seen: list[Any]) -> App:
    async def answer(request: Request) -> Response:
        await request.json()
        seen.append(request.caller)
        return Response()

    app = App(token=TOKEN, keys=key, gate=gate)
    app.add("POST", "/data", answer, is_data=True, for_keys=True)
    app.add("POST", "/admin", answer)
    return app


async def test_a_request_too_many_is_refused_before_its_body_is_read() -> None:
    reading = 0

    @contextmanager
    def gate() -> Iterator[Count]:
        nonlocal reading
        if reading:
            raise QueueFullError("full")
        reading += 1
        yield bool
        reading -= 1

    seen: list[Any] = []
    app = make_gated(OneKey(), gate, seen)
    headers = {"host": "localhost", "authorization": f"Bearer {TOKEN}", **JSON}
    slow = Call(app, [b"{", b"}"])
    async with trio.open_nursery() as nursery:
        slow.parts.clear()  # its body has not come
        nursery.start_soon(slow.run, "POST", "/data", headers)
        await wait_all_tasks_blocked()
        other = Call(app, [b"{}"])
        refused = await other.run("POST", "/data", headers)
        assert (refused.status, refused.headers[b"retry-after"]) == (429, b"1")
        assert other.parts == [b"{}"]
        assert (await ask(app, "POST", "/admin", b"{}", **JSON)).status == 200
        slow.left.set()
    assert (await ask(app, "POST", "/data", b"{}", **JSON)).status == 200
    assert reading == 0


async def test_the_bytes_of_a_body_are_counted_as_they_come_and_may_be_too_many() -> None:
    counted: list[int] = []

    def count(size: int) -> None:
        if sum(counted) + size > 5:
            raise QueueFullError("full")
        counted.append(size)

    app = make_gated(OneKey(), partial(nullcontext, count), [])
    assert (await ask(app, "POST", "/data", b"{", b"}", **JSON)).status == 200
    refused = await ask(app, "POST", "/data", b"{  ", b"}", **JSON)
    assert (refused.status, refused.headers[b"retry-after"]) == (429, b"1")
    assert counted == [1, 1, 3]


async def test_a_key_opens_the_routes_for_keys_only() -> None:
    key, seen = OneKey(), []
    app = make_gated(key, NO_GATE, seen)
    bees = {"authorization": "Bearer bee's", **JSON}
    assert (await ask(app, "POST", "/data", b"{}", **bees)).status == 200
    assert (await ask(app, "POST", "/data", b"{}", **JSON)).status == 200
    assert seen == [key, None]
    for path in ("/admin", "/nowhere"):
        assert (await ask(app, "POST", path, b"{}", **bees)).error["code"] == "not_for_keys"
    for wrong in ("bee", ""):
        wrongs = {"authorization": f"Bearer {wrong}", **JSON}
        assert (await ask(app, "POST", "/data", b"{}", **wrongs)).status == 401


async def test_a_key_that_has_had_its_share_hears_when_to_come_again() -> None:
    key = OneKey(running=1)
    call = Call(make_gated(key, NO_GATE, []), [b"{}"])
    headers = {"host": "localhost", "authorization": "Bearer bee's", **JSON}
    refused = await call.run("POST", "/data", headers)
    assert (refused.status, refused.headers[b"retry-after"]) == (429, b"7")
    assert refused.error["code"] == "rate_limited"
    assert call.parts == [b"{}"]


async def test_a_bug_is_500_logged_and_not_told(error_records: list[logging.LogRecord]) -> None:
    async def fail(request: Request) -> Response:
        raise KeyError("a secret of ours")

    app = make()
    app.add("GET", "/fail", fail)
    answer = await ask(app, "GET", "/fail")
    assert (answer.status, answer.error["code"]) == (500, "internal")
    assert b"secret" not in answer.body
    assert "a secret of ours" in str(error_records.pop().exc_info)


async def test_a_body_that_the_fallback_reads_must_come_in_time(
    autojump_clock: trio.abc.Clock,
) -> None:
    async def read_it(scope: Any, receive: Any, send: Any) -> None:
        async with trio.open_nursery() as nursery:  # as an app may: an error of ours is in a group
            nursery.start_soon(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    call = Call(make(fallback=read_it), [])
    headers = {"host": "localhost", "authorization": f"Bearer {TOKEN}"}
    answer = await call.run("POST", "/other", headers)
    assert (answer.status, answer.error["code"]) == (408, "too_slow")
    assert trio.current_time() == pytest.approx(SILENCE, abs=1)


async def test_what_the_fallback_waits_for_behind_a_body_may_take_any_time(
    autojump_clock: trio.abc.Clock,
) -> None:
    async def watch(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"all"
        with trio.move_on_after(1000):
            await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    assert (await ask(make(fallback=watch), "POST", "/other", b"all")).status == 200


async def test_the_fallback_takes_the_rest_after_the_same_checks() -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b"theirs"})

    app = make(fallback=other)
    assert (await ask(app, "GET", "/v1/models")).body == b"theirs"
    assert (await ask(app, "GET", "/v1/workers")).status == 200
    assert (await ask(app, "PUT", "/v1/workers")).status == 405
    assert (await ask(app, "GET", "/v1/models", authorization="")).status == 401
    assert (await ask(app, "GET", "/v1/models", host="evil.example")).status == 403
    assert (await ask(app, "GET", "/v1/models", origin="null")).status == 403


# streams --------------------------------------------------------------------------------------
def streaming(run: Callable[[Emit], Any]) -> App:
    async def start(request: Request) -> Stream:
        return Stream(run, ((b"x-job", b"7"),))

    app = make()
    app.add("POST", "/stream", start)
    return app


async def test_a_stream_sends_its_head_with_its_first_chunk_and_then_ends() -> None:
    async def run(emit: Emit) -> None:
        await emit(b"a")
        await emit(b"b")

    answer = await ask(streaming(run), "POST", "/stream")
    assert (answer.status, answer.body, answer.ended) == (200, b"ab", True)
    assert answer.headers[b"content-type"] == b"text/event-stream"
    assert answer.headers[b"x-accel-buffering"] == b"no"
    assert answer.headers[b"x-job"] == b"7"


async def test_a_stream_without_a_chunk_is_an_empty_answer() -> None:
    async def run(emit: Emit) -> None:
        await trio.lowlevel.checkpoint()

    answer = await ask(streaming(run), "POST", "/stream")
    assert (answer.status, answer.body, answer.ended) == (200, b"", True)


async def test_a_refusal_before_the_first_chunk_is_a_plain_error() -> None:
    async def run(emit: Emit) -> None:
        raise UnavailableError("no slot")

    answer = await ask(streaming(run), "POST", "/stream")
    assert (answer.status, answer.error["message"], answer.ended) == (503, "no slot", True)


async def test_an_error_in_the_middle_never_ends_the_answer_as_if_complete() -> None:
    async def run(emit: Emit) -> None:
        await emit(b"a")
        raise UnavailableError("gone")

    call = Call(streaming(run), [b""])
    headers = {"host": "localhost", "authorization": f"Bearer {TOKEN}"}
    with pytest.RaisesGroup(UnavailableError, flatten_subgroups=True):
        await call.run("POST", "/stream", headers)
    assert (call.answer.body, call.answer.ended) == (b"a", False)


async def test_a_stream_is_cancelled_when_its_client_goes_away() -> None:
    ended = trio.Event()

    async def run(emit: Emit) -> None:
        try:
            await emit(b"a")
            await trio.sleep_forever()
        finally:
            ended.set()

    call = Call(streaming(run), [b""])
    headers = {"host": "localhost", "authorization": f"Bearer {TOKEN}"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call.run, "POST", "/stream", headers)
        await wait_all_tasks_blocked()
        assert (call.answer.body, ended.is_set()) == (b"a", False)
        call.left.set()
        with trio.fail_after(1):
            await ended.wait()
    assert not call.answer.ended


async def test_a_body_whose_client_left_is_refused() -> None:
    call = Call(make(), [])
    call.left.set()
    headers = {"host": "localhost", "authorization": f"Bearer {TOKEN}", **JSON}
    answer = await call.run("POST", "/v1/workers", headers)
    assert answer.error["message"] == "the body ended early"


async def test_a_websocket_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await make()({"type": "websocket"}, send, send)
    assert sent == [{"type": "websocket.close"}]
