"""An asyncio ASGI app, called from trio."""

import asyncio
from functools import partial

import httpx
import pytest
import trio

from rbee.aio import open_aio
from rbee.web.client import open_client
from rbee.web.listener import open_listener
from rbee.web.server import serve_http
from rbee.worker.bridge import AioApp


async def echo_app(scope, receive, send):
    """Answer with the request's body, piece by piece."""
    assert asyncio.get_running_loop()
    assert "state" not in scope
    await send({"type": "http.response.start", "status": 201, "headers": [(b"x-a", b"b")]})
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)
        for byte in message["body"]:
            await send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})
    await send({"type": "http.response.body", "body": b"."})


async def call(app, *messages):
    """Call an ASGI app with these request messages; return what it sent."""
    sent, inbox = [], list(messages)

    async def receive():
        if not inbox:
            await trio.sleep_forever()
        return inbox.pop(0)

    async def send(message):
        sent.append(message)

    await app({"type": "http", "state": {}}, receive, send)
    return sent


async def test_a_request_crosses_and_its_chunks_are_merged():
    body = b"0123456789" * 100
    with trio.fail_after(5):
        async with open_aio() as aio:
            sent = await call(
                AioApp(aio, echo_app),
                {"type": "http.request", "body": body[:500], "more_body": True},
                {"type": "http.request", "body": body[500:]},
            )
    assert sent[0]["status"] == 201
    assert b"".join(message["body"] for message in sent[1:]) == body + b"."
    assert len(sent) < 100
    assert [message.get("more_body", False) for message in sent[1:]][-1] is False


async def test_the_apps_error_is_raised_to_the_caller():
    async def app(scope, receive, send):
        raise ValueError("boom")

    with trio.fail_after(5):
        async with open_aio() as aio:
            with pytest.RaisesGroup(ValueError):
                await call(AioApp(aio, app), {"type": "http.request", "body": b""})


@pytest.mark.parametrize("how", ["disconnect", "cancel"])
async def test_a_client_that_leaves_cancels_the_app(how):
    cancelled = trio.Event()

    async def app(scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.sleep(60)
        finally:
            token.run_sync_soon(cancelled.set)

    token = trio.lowlevel.current_trio_token()
    with trio.fail_after(5):
        async with open_aio() as aio:
            async with trio.open_nursery() as nursery:
                begun = trio.Event()

                async def receive():
                    await begun.wait()
                    if how == "cancel":
                        await trio.sleep_forever()
                    return {"type": "http.disconnect"}

                async def send(message):
                    begun.set()

                nursery.start_soon(AioApp(aio, app), {"type": "http"}, receive, send)
                await begun.wait()
                if how == "cancel":
                    nursery.cancel_scope.cancel()
            await cancelled.wait()


@pytest.mark.parametrize("how", ["disconnect", "cancel"])
async def test_a_client_that_leaves_ends_what_the_app_does_in_a_task_of_its_own(how):
    """As vLLM answers: one task works, one waits for the disconnect that cancels it."""
    cancelled = trio.Event()

    async def work():
        try:
            token.run_sync_soon(begun.set)
            await asyncio.sleep(60)
        finally:
            token.run_sync_soon(cancelled.set)

    async def app(scope, receive, send):
        working = asyncio.ensure_future(work())
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        working.cancel()

    token = trio.lowlevel.current_trio_token()
    begun = trio.Event()

    async def receive():
        await begun.wait()
        if how == "cancel":
            await trio.sleep_forever()
        return {"type": "http.disconnect"}

    with trio.fail_after(5):
        async with open_aio() as aio:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(AioApp(aio, app), {"type": "http"}, receive, None)
                await begun.wait()
                if how == "cancel":
                    nursery.cancel_scope.cancel()
            with trio.fail_after(0.3):
                await cancelled.wait()


async def test_it_serves_real_http():
    with trio.fail_after(10):
        async with open_aio() as aio, trio.open_nursery() as nursery:
            http = partial(serve_http, AioApp(aio, http_only(echo_app)), grace=0.1)
            url = await nursery.start(http, open_listener("127.0.0.1", 0, exact=True))
            async with open_client(url) as client:
                response: httpx.Response = await client.post("/", content=b"hello")
                assert (response.status_code, response.content) == (201, b"hello.")
            nursery.cancel_scope.cancel()


def http_only(app):
    async def with_lifespan(scope, receive, send):
        if scope["type"] == "http":
            return await app(scope, receive, send)
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return None

    return with_lifespan
