"""Call an ASGI application that lives in asyncio from a server that lives in trio."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

import trio

from rbee.aio import Aio, Outbox
from rbee.web.out import Receive, Send
from rbee.web.router import Scope
from rbee.worker.engine import ASGIApp

Message = MutableMapping[str, Any]

# Of the server's own: its state is not the app's, and the app cannot use what trio extends.
DROPPED = ("state", "extensions")


LEAVE = 0.1  # seconds for an app to end by itself once its client has gone


class AioApp:
    """An asyncio ASGI app as a trio one. Cancelling a call tells the app that its client has gone,
    then cancels its task.

    The one does not replace the other: vLLM generates an answer that is no stream in a task of its
    own, which ends at a disconnect but would outlive the cancelled one that waits for it.
    """

    def __init__(self, aio: Aio, app: ASGIApp) -> None:
        self._aio = aio
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        outbox: Outbox[Message | None] = self._aio.outbox()
        theirs = {key: value for key, value in scope.items() if key not in DROPPED}
        task = self._aio.spawn(self._run, theirs, inbox, outbox)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, receive, inbox, nursery.cancel_scope)
                await _relay(outbox, send)
                await task.wait()
                nursery.cancel_scope.cancel(reason="answered")
        finally:
            self._aio.soon(inbox.put_nowait, {"type": "http.disconnect"})
            # Cleanup: bounded, because the app may not listen.
            with trio.move_on_after(LEAVE, shield=True), suppress(Exception):
                await task.wait()
            await task.aclose()

    async def _run(
        self, scope: Scope, inbox: asyncio.Queue[Message], outbox: Outbox[Message | None]
    ) -> None:
        try:
            await self._app(scope, inbox.get, outbox.send)
        finally:
            outbox.put(None)

    async def _pump(
        self, receive: Receive, inbox: asyncio.Queue[Message], scope: trio.CancelScope
    ) -> None:
        """Pass the body on; after a disconnect nobody wants the answer."""
        while True:
            message = await receive()
            self._aio.soon(inbox.put_nowait, message)
            if message["type"] == "http.disconnect":
                scope.cancel(reason="client disconnected")
                return


async def _relay(outbox: Outbox[Message | None], send: Send) -> None:
    """Send what the app sends, consecutive chunks of one batch merged, until it has ended."""
    while True:
        chunks: list[bytes] = []
        for message in await outbox.take():
            if message is not None and message.get("more_body"):
                chunks.append(message.get("body", b""))
                continue
            await _flush(chunks, send)
            if message is None:
                return
            await send(message)
        await _flush(chunks, send)


async def _flush(chunks: list[bytes], send: Send) -> None:
    if chunks:
        body = b"".join(chunks)
        chunks.clear()
        await send({"type": "http.response.body", "body": body, "more_body": True})
