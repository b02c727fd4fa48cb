"""The route of a daemon's OpenAPI document, which is made when it is first asked for."""

from __future__ import annotations

import json
from functools import cache

import trio

from rbee.web.router import App, Request, Response
from rbee.wire import messages


def add_openapi_route(app: App, daemon: str) -> None:
    async def show(request: Request) -> Response:
        return Response(await trio.to_thread.run_sync(_text_of, daemon))

    app.add("GET", messages.OPENAPI, show)


@cache
def _text_of(daemon: str) -> bytes:
    from rbee.api.documents import document_of  # imports what the daemon never needs

    return json.dumps(document_of(daemon)).encode()
