"""What a worker forks dies with it and keeps none of its sockets.

vLLM's EngineCore has nothing towards the process it serves: killed -9, that process leaves it
behind with its memory, for ever. So every process below a worker carries PR_SET_PDEATHSIG. It is
not inherited by fork, hence two ways in: `protect_forks` for processes forked by the worker and by
what it forked, `register` (entry point ``vllm.general_plugins``) for spawned ones.

Only our own programs call `protect_forks`; `register` does nothing outside of them.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys

from rbee.guard import die_with_parent

_parent = 0
_null = -1
_private: tuple[int, ...] = ()


def protect_forks(*private: int) -> None:
    """From now on bind every process forked below this one to its parent.

    Such a process also loses the network sockets it inherited (an orphan would keep the port, a
    live one would keep closed connections open for their peers) and the ``private`` descriptors.
    """
    global _private, _null
    _private = private
    if _null < 0:
        _null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _before_fork() -> None:
    global _parent
    _parent = os.getpid()


def _after_fork() -> None:
    die_with_parent(signal.SIGKILL, _parent)
    signal.set_wakeup_fd(-1)  # it is the parent's
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for fd in {*_private, *_network_sockets()}:
        # Not closed: an object of the parent's may still close this number when it is collected,
        # and by then it would belong to somebody else.
        os.dup2(_null, fd, inheritable=fd <= 2)


def _network_sockets() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" else []:
        fd = int(name)
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as sock:
                if sock.family in (socket.AF_INET, socket.AF_INET6):
                    found.append(fd)
        except OSError:
            continue  # the descriptor of the listing itself
    return found


def register() -> None:
    """Bind a process that vLLM has spawned to its parent; nothing outside of rbee's programs."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or not os.environ.get("RBEE_NONCE"):
        return
    die_with_parent(signal.SIGKILL, parent.pid)
