"""The port of a daemon, bound before there is anything to serve on it."""

from __future__ import annotations

import errno
import logging
import socket

from rbee.errors import BadInputError, ConflictError, MachineError
from rbee.web.holder import find_holder

log = logging.getLogger(__name__)

NEXT_PORTS = 200  # how many ports an owned daemon tries above its own


def open_listener(host: str, port: int, *, exact: bool) -> socket.socket:
    """Bind ``host:port``; 0 is any free port.

    Args:
        exact: fail if the port is taken (an operator asked for it), else take the next free one.

    Raises:
        BadInputError: there is no such address or port.
        ConflictError: the port is taken, or none is free in reach.
        MachineError: the address is not one of this machine, or the port not for this user.
    """
    if not host:  # which would be every address
        raise BadInputError("the address to listen on is empty", hint="--host 127.0.0.1")
    if not 0 <= port <= 65535:
        raise BadInputError(f"port {port} is not between 0 and 65535", hint="--port 0")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last = port if exact or port == 0 else min(port + NEXT_PORTS, 65535)
    for candidate in range(port, last + 1):
        try:
            listener = socket.create_server((host, candidate), family=family, backlog=1024)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise _cannot_listen(host, candidate, exc) from exc
            continue
        if candidate != port:
            log.info("port %d is taken, using %d", port, candidate)
        return listener
    raise ConflictError(
        f"port {port} on {host} is taken"
        + (find_holder(port) if exact else f", and so are all up to {last}"),
        code="port_taken",
        hint=f"ss -ltnp 'sport = :{port}'   # or pass --port 0 for any free port",
    )


def _cannot_listen(host: str, port: int, exc: OSError) -> MachineError:
    if exc.errno == errno.EACCES:
        hint = "--port 8080   # those below 1024 are for root alone"
        return MachineError(f"not allowed to listen on {host}:{port}: {exc.strerror}", hint=hint)
    return MachineError(f"cannot listen on {host}:{port}: {exc.strerror or exc}")


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
