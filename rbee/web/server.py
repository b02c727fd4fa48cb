"""One HTTP server: hypercorn's trio worker on a listener of ours, with a bounded end."""

from __future__ import annotations

import logging
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import trio
from hypercorn.config import Config

from rbee.web.connections import serve_connections
from rbee.web.front import Front
from rbee.web.listener import url_of

log = logging.getLogger(__name__)

ANY_HOST = ("0.0.0.0", "::")


async def serve_http(
    app: Any,
    listener: socket.socket,
    *,
    stall_limit: float = 30.0,
    grace: float = 1.0,
    front: Front | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``app`` on ``listener`` (taken over) until cancelled; started with the base URL.

    Cancelling closes the listener at once and gives running answers ``grace`` seconds; whoever
    has not read his answer by then is cut off, for hypercorn shields its writes without a
    deadline and one stalled reader would block the cascade for ever.

    Args:
        front: serves the data routes of ``app`` itself.
    """
    url, address = url_of(listener), listener.getsockname()
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_limit * 1000))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    closing = trio.Event()
    serve = partial(serve_connections, app, _config(grace), listener, closing.wait, front=front)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_set_when_cancelled, closing)
        # Not a shield around work: the end is ordered through `closing` and bounded by `grace`.
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as inner:
                inner.start_soon(_cut_after, closing, grace, address)
                inner.start_soon(_run_then_cancel, serve, inner.cancel_scope, url, task_status)
        nursery.cancel_scope.cancel(reason="server ended")


def _config(grace: float) -> Config:
    config = Config()
    config.graceful_timeout = grace
    config.keep_alive_timeout = 75.0
    config.include_server_header = False
    config.errorlog = logging.getLogger("rbee.web.hypercorn")
    config.errorlog.setLevel(logging.WARNING)
    return config


async def _run_then_cancel(
    serve: Any, scope: trio.CancelScope, url: str, task_status: trio.TaskStatus[str]
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        task_status.started(url)
    scope.cancel(reason="no connection is left")


async def _set_when_cancelled(event: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        event.set()


async def _cut_after(closing: trio.Event, grace: float, address: Any) -> None:
    await closing.wait()
    await trio.sleep(grace)
    if cut := cut_accepted(address):
        log.warning("cut %d connections whose readers had stalled", cut)


def cut_accepted(address: Any) -> int:
    """Shut down every connection of this process that was accepted at ``address``."""
    cut = 0
    for name in Path("/proc/self/fd").iterdir():
        try:
            if not str(name.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name.name))) as sock:
                if _is_at(sock.getsockname(), address) and sock.getpeername():
                    sock.shutdown(socket.SHUT_RDWR)
                    cut += 1
        except OSError:
            continue
    return cut


def _is_at(name: Any, address: Any) -> bool:
    """Tell whether a socket of that name was accepted by a listener at ``address``."""
    return name == address or (address[0] in ANY_HOST and name[1:2] == address[1:2])
