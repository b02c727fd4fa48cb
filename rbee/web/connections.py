"""Accept connections for hypercorn's trio worker, each on its own: one that fails ends alone.

`hypercorn.trio.serve` lets what a connection raises end the whole server, and a peer without any
token can make one raise (HTTP/2 with a path that is not ASCII). Its parts below are used instead.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Event, RawData, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState

from rbee.errors import leaves
from rbee.web.front import Front

log = logging.getLogger(__name__)


async def serve_connections(
    app: Any,
    config: Config,
    listener: socket.socket,
    closing: Callable[[], Awaitable[object]],
    *,
    front: Front | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an ASGI app until ``closing`` returns, then give what runs the graceful timeout.

    The listener is taken over, and closed when ``closing`` returns.

    Args:
        front: gets each connection first and hands over what is not its own.
    """
    context = WorkerContext(None)
    connect = partial(_serve_one, ASGIWrapper(app), config, context)
    if front is not None:
        connect = partial(front.serve, hand_over=connect)
    sockets = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
    async with trio.open_nursery() as connections:
        accept = partial(trio.serve_listeners, connect, sockets, handler_nursery=connections)
        async with trio.open_nursery() as accepting:
            accepting.start_soon(accept)
            task_status.started()
            await closing()
            accepting.cancel_scope.cancel(reason="closing")
        if front is not None:
            front.close_idle()
        await context.terminated.set()
        connections.cancel_scope.deadline = trio.current_time() + config.graceful_timeout


class _Connection(TCPServer):
    """A connection that ends when its peer closes it.

    hypercorn's own lingers until the keep-alive is over, with a descriptor.
    """

    _peer_gone = False

    async def _read_data(self) -> None:
        await super()._read_data()
        self._peer_gone = True
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            await super().protocol_send(event)
        elif not (isinstance(event, Updated) and self._peer_gone):
            # Bounded. An answer's end tells the app of a disconnect, and one that watches for it
            # is cancelled just here: nobody would close the connection, or see that it is idle.
            with trio.CancelScope(shield=True):
                await super().protocol_send(event)


async def _serve_one(app: ASGIWrapper, config: Config, context: WorkerContext, stream: Any) -> None:
    try:
        await _Connection(app, config, context, ConnectionState(LifespanState()), stream)
    except* Exception as group:
        kind = type(next(leaves(group))).__name__  # the text may quote what the peer sent
        log.info("dropped a connection that could not be served: %s", kind)
