"""The zygote that a hive forks off itself, before anything runs in it.

An owner may say in the first line which engine he will want at once. One that needs no model
imports little but what the hive has imported as well: forked off, its zygote is ready before the
hive serves, and takes half the CPU. From then on it is a zygote like any other.
"""

from __future__ import annotations

import logging
import os
import socket
from functools import partial
from pathlib import Path

from rbee import guard
from rbee.hive import zygote
from rbee.hive.zygotes import ONE_THREAD, Child
from rbee.models.access import TOKENLESS
from rbee.worker.engine import engine_kind

log = logging.getLogger(__name__)


def fork_ahead(engine: str, log_file: Path) -> dict[str, Child]:
    """Fork the engine's zygote if that is better than to execute it later: {engine: child}."""
    try:
        if engine and _is_better(engine):
            return {engine: _fork(engine, log_file)}
    except Exception as exc:  # it is for speed only: whoever asks for a worker is told
        log.info("no zygote of engine %s ahead: %s (%s)", engine, exc, type(exc).__name__)
    return {}


def _is_better(engine: str) -> bool:
    # A hub's token would be in the environment of all workers.
    return not (any(map(os.environ.get, TOKENLESS)) or engine_kind(engine).needs_model)


def _fork(engine: str, log_file: Path) -> Child:
    import rbee.web.client
    import rbee.web.server  # noqa: F401 - both need these

    zygote.refuse_unsafe_fork()  # last: an engine's module may have begun threads
    parent = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        pid = os.fork()
    except OSError:
        ours.close()
        raise
    else:
        if pid == 0:
            _become_zygote(engine, theirs, parent, log_file)
    finally:
        theirs.close()
    return Child(pid, ours, partial(_poll, pid))


def _poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _become_zygote(engine: str, sock: socket.socket, parent: int, log_file: Path) -> None:
    """In the forked child: never return, and hold nothing of the hive's."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        guard.append_log(str(log_file))
        os.dup2(2, 1)
        guard.close_all_but([sock.fileno()])
        os.setsid()
        os.environ.update(ONE_THREAD)
        code = zygote.serve(engine, sock, parent, str(log_file))
    except BaseException:
        logging.exception("zygote failed")
    finally:
        os._exit(code)
