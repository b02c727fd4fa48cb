"""Who is let in: pages of allowed origins, one of each header, and how often a peer may err."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from rbee.errors import UsageError
from rbee.web.door import CORS, Failures, checked_origin, peer_of
from rbee.web.router import Emit, Request, Stream
from tests.web.test_router import JSON, TOKEN, Answer, Call, ask, make

PAGE = "https://chat.example"
OWN = {"host": "localhost:8080", "authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize("name", ["host", "authorization", "origin", "content-type"])
async def test_a_header_that_decides_comes_once(name: str) -> None:
    headers = OWN | {"origin": PAGE} | JSON
    call = Call(make(allowed_origins=[PAGE]), [b"{}"])
    call.more.append((name.encode(), headers[name].encode()))
    answer = await call.run("POST", "/v1/workers", headers)
    assert (answer.status, answer.error["code"]) == (400, "bad_input")
    assert answer.error["message"] == f"the header {name} came 2 times"


# pages ----------------------------------------------------------------------------------------
def allowed(answer: Answer) -> bytes | None:
    assert answer.headers[b"vary"] == b"origin"
    return answer.headers.get(b"access-control-allow-origin")


async def from_page(method: str, path: str, origin: str = PAGE, **headers: str) -> Answer:
    app = make(allowed_origins=[PAGE, "http://localhost:3000"])

    async def run(emit: Emit) -> None:
        await emit(b"a")

    async def stream(request: Request) -> Stream:
        return Stream(run, ((b"x-rbee-job-id", b"7"),))

    async def theirs(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app.add("GET", "/stream", stream)
    app.fallback = theirs
    return await ask(app, method, path, origin=origin, **headers)


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/workers", 200), ("/health", 200), ("/stream", 200), ("/other", 299)],
)
async def test_a_page_of_an_allowed_origin_may_call_with_the_token(path: str, status: int) -> None:
    answer = await from_page("GET", path)
    assert (answer.status, allowed(answer)) == (status, PAGE.encode())
    assert b"x-rbee-job-id" in answer.headers[b"access-control-expose-headers"]


async def test_without_the_token_it_may_read_only_that_one_is_needed() -> None:
    answer = await from_page("GET", "/v1/workers", authorization="")
    assert (answer.status, allowed(answer)) == (401, PAGE.encode())


async def test_an_allowed_page_still_needs_a_host_of_ours() -> None:
    assert (await from_page("GET", "/health", host="evil.example")).status == 403


@pytest.mark.parametrize(
    "origin", ["https://chat.example.evil.example", "http://chat.example", "null", "", "*"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_a_page_of_any_other_origin_is_refused(method: str, origin: str) -> None:
    asks = {"access-control-request-method": "POST"} if method == "OPTIONS" else {}
    answer = await from_page(method, "/v1/workers", origin, **asks, **JSON)
    assert (answer.status, allowed(answer)) == (403, None)
    assert answer.error["code"] == "origin"


@pytest.mark.parametrize("path", ["/v1/workers", "/nothing", "/health"])
async def test_a_preflight_is_answered_without_the_token(path: str) -> None:
    asks = {"access-control-request-method": "POST", "authorization": ""}
    answer = await from_page("OPTIONS", path, **asks)
    assert (answer.status, answer.body, allowed(answer)) == (204, b"", PAGE.encode())
    assert set(CORS) <= set(answer.headers.items())


async def test_options_of_another_kind_are_a_request_like_any() -> None:
    assert (await from_page("OPTIONS", "/v1/workers", authorization="")).status == 401
    assert (await from_page("OPTIONS", "/v1/workers")).status == 405


async def test_without_allowed_pages_answers_do_not_depend_on_the_origin() -> None:
    assert b"vary" not in (await ask(make(), "GET", "/v1/workers")).headers


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://chat.example", "https://chat.example"),
        ("HTTPS://Chat.Example/", "https://chat.example"),
        ("https://chat.example:443", "https://chat.example"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:80", "http://[::1]"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
    ],
)
def test_an_origin_is_taken_as_browsers_send_it(given: str, origin: str) -> None:
    assert checked_origin(given) == origin


@pytest.mark.parametrize(
    "given",
    ["*", "null", "", "chat.example", "https://*.example", "https://chat.example/path",
     "https://user@chat.example", "https://", "https://a b", "https://a\n", "https://bücher.example",
     "https://a:b"],
)  # fmt: skip
def test_what_is_no_origin_of_one_site_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="--allow-origin takes SCHEME://HOST"):
        checked_origin(given)


# failures -------------------------------------------------------------------------------------
async def fail(app: Any, peer: str = "192.0.2.7", token: str = "wrong") -> int:
    headers = {"host": "localhost", "authorization": f"Bearer {token}"}
    return (await Call(app, [b""]).run("GET", "/v1/workers", headers, peer)).status


async def test_who_fails_often_hears_when_to_come_again(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rbee.web")
    app = make()
    assert [await fail(app) for _ in range(13)] == [401] * 10 + [429] * 3
    assert len(caplog.records) == 10  # a flood does not fill the log
    answer = await ask(app, "GET", "/v1/workers")
    assert answer.status == 200
    headers = {"host": "localhost", "authorization": ""}
    answer = await Call(app, [b""]).run("GET", "/v1/workers", headers, "192.0.2.7")
    assert (answer.status, answer.headers[b"retry-after"]) == (429, b"1")
    assert answer.error["code"] == "too_many_failures"
    await trio.sleep(1)
    assert [await fail(app) for _ in range(2)] == [401, 429]


async def test_others_and_the_right_token_are_not_hurt(autojump_clock: MockClock) -> None:
    app = make()
    assert [await fail(app) for _ in range(11)][-1] == 429
    assert await fail(app, token=TOKEN) == 200
    assert await fail(app, peer="192.0.2.8") == 401
    headers = {"host": "localhost"}
    assert (await Call(app, [b""]).run("GET", "/health", headers, "192.0.2.7")).status == 200


async def test_failures_are_remembered_of_so_many_peers_only(autojump_clock: MockClock) -> None:
    failures = Failures(burst=1, peers=3)
    assert [failures.is_over(peer) for peer in "abcd"] == [False] * 4
    assert len(failures._left) == 3
    assert failures.is_over("b")  # and is now the one that failed last
    assert [failures.is_over(peer) for peer in "ecb"] == [False, False, True]


@pytest.mark.parametrize(
    ("client", "peer"),
    [
        (("192.0.2.7", 1), "192.0.2.7"),
        (("::ffff:192.0.2.7", 1), "192.0.2.7"),
        (("2001:db8::5", 1), "2001:db8::/64"),
        (("fe80::1%eth0", 1), "fe80::/64"),
        (None, ""),
        (("/run/socket", None), "/run/socket"),
    ],
)
def test_a_peer_is_an_address_or_an_ipv6_network(client: Any, peer: str) -> None:
    assert peer_of(client) == peer
