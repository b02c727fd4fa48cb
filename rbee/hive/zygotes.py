"""The hive's side of its zygotes: one per engine, started when first needed."""

from __future__ import annotations

import array
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from rbee import guard
from rbee.errors import ChildExitedError, MachineError
from rbee.hive import zygote as protocol
from rbee.models.access import TOKENLESS
from rbee.process import Lifeline, Process, log_tail
from rbee.wire import codec

log = logging.getLogger(__name__)

REPORT = 1.5  # seconds for a zygote to tell of an exit; it may first kill what is left, for one
ANSWER = 1.0  # seconds for a zygote to answer when nobody waits for the worker any more
END = 2.0  # seconds for a zygote without workers to go by itself

# A pool of any library that is imported would be there before the fork. The first one alone does
# for all of them, unless the user's environment names another.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class CannotForkError(MachineError):
    """The zygote must not fork (threads, a CUDA context); an exec still works."""

    code = "cannot_fork"


@attrs.define(eq=False)
class Zygote:
    """One living zygote; `fork` waits until it has imported its engine."""

    engine: str
    _sock: trio.socket.SocketType
    _log_file: Path
    ready: trio.Event = attrs.field(factory=trio.Event)
    gone: bool = False
    _forks: dict[str, _Fork] = attrs.field(factory=dict)
    _exits: dict[int, _Exit] = attrs.field(factory=dict)

    async def fork(self, plan: Mapping[str, Any], config: Any, log_fd: int) -> Process:
        """Fork a guarded worker; its process is the guard.

        Raises:
            CannotForkError: exec it instead.
            ChildExitedError: the zygote died.
        """
        await self.ready.wait()
        reader, writer = os.pipe()
        fork = self._forks[config.spec.id] = _Fork()
        try:
            await self._send({"fork": dict(plan), "config": codec.to_dict(config)}, reader, log_fd)
            # It answers at once; a guard that nobody had heard of could not be waited for.
            with trio.move_on_after(ANSWER, shield=True):
                await fork.done.wait()
            if not fork.done.is_set():
                await fork.done.wait()
            return self._process(fork, writer)
        except BaseException:
            os.close(writer)  # its guard, if there is one, ends by this
            self._drop(fork)
            raise
        finally:
            os.close(reader)
            del self._forks[config.spec.id]

    def _process(self, fork: _Fork, writer: int) -> Process:
        if self.gone and not fork.pid:
            raise self._died()
        if fork.error:
            raise CannotForkError(fork.error)
        os.set_blocking(writer, False)
        known = self._exits[fork.pid]

        async def reap() -> int:
            with trio.move_on_after(REPORT):  # a frozen zygote does not report it
                await known.done.wait()
            self._exits.pop(fork.pid, None)
            return known.status

        return Process(fork.pid, fork.pidfd, Lifeline(writer), reap)

    def _died(self) -> ChildExitedError:
        return ChildExitedError(
            f"the zygote of engine {self.engine} died",
            hint=f"tail -n 50 {self._log_file}",
            log=log_tail(self._log_file),
        )

    def _drop(self, fork: _Fork) -> None:
        if fork.pid:
            os.close(fork.pidfd)
            self._exits.pop(fork.pid, None)

    async def _send(self, message: dict[str, Any], *fds: int) -> None:
        if self.gone:
            raise self._died()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        try:
            await self._sock.sendmsg([json.dumps(message).encode()], ancillary)
        except OSError as exc:
            raise self._died() from exc

    async def _listen(self) -> None:
        """Take messages until the zygote's end of the socket closes."""
        space = socket.CMSG_LEN(4 * array.array("i").itemsize)
        while True:
            try:
                data, ancillary, _, _ = await self._sock.recvmsg(protocol.MAX_MESSAGE, space)
            except OSError:
                return
            if not data:
                return
            self._take(*protocol.unpack(data, ancillary))

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        if "ready" in message:
            log.info("zygote %s imported in %.1f s", self.engine, message["ready"])
            if message["threads"] != 1:
                log.warning("zygote %s has %d threads", self.engine, message["threads"])
            self.ready.set()
        elif "forked" in message:
            fork = self._forks.get(message["forked"])
            if fork is None:  # cancelled meanwhile; its lifeline is closed
                os.close(fds[0])
                return
            fork.pid, fork.pidfd = message["pid"], fds[0]
            self._exits[fork.pid] = _Exit()
            fork.done.set()
        elif "error" in message and message["error"] in self._forks:
            fork = self._forks[message["error"]]
            fork.error = message["message"]
            fork.done.set()
        elif known := self._exits.get(message.get("exited", 0)):
            known.status = message["status"]
            known.done.set()

    def _end(self) -> None:
        self.gone = True
        self.ready.set()
        waited = [fork.done for fork in self._forks.values()]
        waited += [known.done for known in self._exits.values()]
        for event in waited:  # nobody tells more
            event.set()


@attrs.define(eq=False)
class _Fork:
    done: trio.Event = attrs.field(factory=trio.Event)
    pid: int = 0
    pidfd: int = -1
    error: str = ""


@attrs.define(eq=False)
class _Exit:
    done: trio.Event = attrs.field(factory=trio.Event)
    status: int = 137


@attrs.frozen
class Child:
    """A process that is to be a zygote: our end of its socket, and how it is reaped.

    ``poll`` returns its exit code, or None while it runs.
    """

    pid: int
    sock: socket.socket
    poll: Callable[[], int | None]


def execute_zygote(engine: str, log_file: Path, env: Mapping[str, str]) -> Child:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, **env, **TOKENLESS, **ONE_THREAD, "SPT_NOENV": "1"}
    argv = [
        sys.executable,
        "-m",
        "rbee.hive.zygote",
        engine,
        str(theirs.fileno()),
        str(os.getpid()),
        str(log_file),
    ]
    with log_file.open("ab") as output, guard.held_interrupt():
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
            pass_fds=[theirs.fileno()], start_new_session=True,
        )  # fmt: skip
    theirs.close()
    return Child(child.pid, ours, child.poll)


async def run_zygote(
    engine: str,
    child: Child,
    *,
    log_file: Path,
    task_status: trio.TaskStatus[Zygote] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Own one zygote until it ends; started at once, before it has imported anything.

    Cancelling ends it and, through their guards, the workers it forked.
    """
    pidfd = os.pidfd_open(child.pid)
    sock = trio.socket.from_stdlib_socket(child.sock)
    zygote = Zygote(engine, sock, log_file)
    try:
        task_status.started(zygote)
        await zygote._listen()
    finally:
        imported = zygote.ready.is_set()
        zygote._end()
        sock.close()  # its lifeline
        with trio.CancelScope(shield=True):
            guard.signal_pidfd(pidfd, signal.SIGCONT)  # a frozen one sees the end as well
            # One that is still importing has forked nothing and hears nothing.
            with trio.move_on_after(END if imported else 0):
                await trio.lowlevel.wait_readable(pidfd)
            guard.signal_pidfd(pidfd, signal.SIGKILL)
            with trio.move_on_after(END):  # one that is stuck in the kernel goes later
                await trio.lowlevel.wait_readable(pidfd)
        log.info("zygote %s ended with %s", engine, child.poll())
        os.close(pidfd)


class Zygotes:
    """A hive's zygotes by engine, each started when it is first needed.

    Args:
        ahead: those that run already, to be taken over.
    """

    def __init__(
        self,
        log_file: Callable[[str], Path],
        env: Mapping[str, str],
        ahead: Mapping[str, Child] | None = None,
    ) -> None:
        self._log_file = log_file
        self._env = env
        self._ahead = dict(ahead or {})
        self._zygotes: dict[str, Zygote] = {}
        self._scopes: set[trio.CancelScope] = set()
        self._lock = trio.Lock()
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None, None]:
        """Hold the zygotes; they end only after the body, even when all is cancelled at once."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for engine in list(self._ahead):
                    await self.get(engine)
                yield
            finally:
                for scope in list(self._scopes):
                    scope.cancel(reason="hive stops")

    async def get(self, engine: str) -> Zygote:
        """Return the engine's living zygote, started if there is none."""
        assert self._nursery is not None
        async with self._lock:
            known = self._zygotes.get(engine)
            if known is not None and not known.gone:
                return known
            # It starts at once. Given up half-way it would go on in its own shield, and we
            # would wait for it with the lock in our hands.
            with trio.CancelScope(shield=True):
                zygote: Zygote = await self._nursery.start(self._run, engine)
            self._zygotes[engine] = zygote
        return zygote

    async def warm_up(self, engine: str, narrate: Callable[[str, str], None]) -> None:
        """Return when the engine's zygote can fork; tell whoever has to wait for that."""
        zygote = await self.get(engine)
        if not zygote.ready.is_set():
            narrate("prepare", f"the engine {engine}, once; later workers start faster")
            await zygote.ready.wait()

    async def _run(self, engine: str, *, task_status: trio.TaskStatus[Zygote]) -> None:
        # Shielded until `open` ends, which is bounded: workers stop within their grace.
        with trio.CancelScope(shield=True) as scope:
            self._scopes.add(scope)
            try:
                log_file = self._log_file(f"zygote-{engine}")
                child = self._ahead.pop(engine, None)
                child = child or execute_zygote(engine, log_file, self._env)
                await run_zygote(engine, child, log_file=log_file, task_status=task_status)
            finally:
                self._scopes.discard(scope)
