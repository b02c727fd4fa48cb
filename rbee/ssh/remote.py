"""A program on a node behind its guards, as a scope: the same line protocol as for a local child.

Nothing that a caller says is ever read by the node's login shell. The command is a constant; the
program that prepares the node (`rbee.ssh.boot`), what it is to do and the guard itself come as
JSON through the channel's input. Then follow ``start {json}``, beats, ``stop``.
"""

from __future__ import annotations

import inspect
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import trio

from rbee import guard
from rbee.errors import BadInputError
from rbee.process import guard_lines
from rbee.ssh import boot, failures
from rbee.ssh.connection import Channel, Connection, End
from rbee.ssh.errors import (
    ConnectionLostError,
    LoginShellError,
    OutputTooLongError,
    RemoteMachineError,
    RemoteProgramError,
    RemotePythonError,
    SshError,
)
from rbee.wire import codec
from rbee.wire.messages import RunFile

log = logging.getLogger(__name__)

# No quote, dollar, backslash or exclamation mark within the quotes: any login shell reads it so.
LOADER = (
    "exec python3 -I -S -c 'import json, os, signal; signal.alarm(5); "
    'exec(json.loads(os.fdopen(0, "rb", 0, closefd=False).readline().decode()))\''
)
# The command's own errors go to us, not to the log of the guard; its input is not the lifeline.
BARE = (
    "import os, sys; os.dup2(3, 2); os.close(3); os.dup2(os.open(os.devnull, os.O_RDONLY), 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)
MINIMUM = (3, 11)
ANSWER = 20.0  # seconds for the login shell and Python to start, loaded nodes included
NOISE = 64 * 1024  # bytes that a login shell may say before us
TOLD = 0.3  # seconds for the guard's word to come; with more, the queen's own end would be late
PATIENCE = 1.0  # seconds for a guard to end before it is woken, should it be frozen
RUN_GRACE = 2.0
OUTPUT = 1 << 20
TAIL = 300


@attrs.frozen
class Facts:
    """What the node answered: where things are there; ``address``: where it is reached, as it sees
    itself ("" if SSH does not tell).
    """

    python: str
    version: tuple[int, ...]
    home: str
    program: str
    log: str
    run_dir: str
    address: str


@attrs.frozen
class OperatorsHive:
    """A hive that an operator has started on the node: what it wrote about itself."""

    run_file: RunFile
    token: str = attrs.field(repr=False)


@attrs.frozen
class Sight:
    """What a hive would find on the node; nothing was changed to learn it.

    Attributes:
        program: where the program is; "" if it is not there.
        rbee: the version of the rbee that it belongs to; "" if nobody knows.
        hive: the hive of this user and home that runs already.
    """

    python: str
    version: tuple[int, ...]
    home: str
    program: str
    rbee: str
    hive: OperatorsHive | None


@attrs.frozen
class Wish:
    """What is to run on a node, in the node's own paths; ``~`` is the user's home there.

    Attributes:
        argv: the program, looked up in the node's PATH, and its arguments; "" is the guards'
            Python.
        graces: seconds between TERM and KILL of each guard, outermost first.
        lease: seconds without our beat after which the guards end it.
        env: added to the environment of the guards and the program.
        home: its ``RBEE_HOME``; "" takes what the node's environment says, then ``~/.rbee``.
        log, run_dir: a bare name is put into the home's logs and run directory; "" for none.
        python: the Python for the guards; "" searches one.
        bare: yield the program's own output and errors: it is no daemon.
    """

    argv: Sequence[str]
    graces: Sequence[float]
    lease: float
    env: Mapping[str, str] = attrs.field(factory=dict)
    home: str = ""
    log: str = ""
    run_dir: str = ""
    python: str = ""
    adopt_grace: float = 0.0
    bare: bool = False


@attrs.define(eq=False)
class RemoteProcess:
    """A guarded program on a node; made by `open_remote`."""

    connection: Connection
    channel: Channel
    facts: Facts
    _rest: bytes

    async def read(self) -> bytes:
        """Return its next output, b"" at the end."""
        if self._rest:
            rest, self._rest = self._rest, b""
            return rest
        return await self.channel.read()

    async def wait(self) -> int:
        """Return the exit code once it has ended.

        Raises:
            ConnectionLostError: nobody knows; its lease ends it.
        """
        end = await self.channel.wait()
        if end.lost:
            raise lost(self.connection)
        return end.status


@attrs.frozen
class Completed:
    """What a program that ran to its end has said."""

    status: int
    stdout: bytes
    stderr: str


async def run(
    connection: Connection,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    limit: int = OUTPUT,
    grace: float = RUN_GRACE,
    python: str = "",
) -> Completed:
    """Run a program on the node to its end; no shell reads ``argv``. Cancelling ends it there.

    Raises:
        RemoteProgramError: there is no such program.
        OutputTooLongError: it says more than ``limit`` bytes.
        ConnectionLostError: the connection went away; the program ends by its lease.
    """
    wish = Wish(argv, [grace], connection.lease, env=env or {}, python=python, bare=True)
    async with open_remote(connection, wish, limit=limit) as process:
        said = b""
        while more := await process.read():
            said += more
        status = await process.wait()
        if process.channel.overflowed:
            raise OutputTooLongError(
                f"{argv[0]} on node {connection.node} says more than {limit} bytes",
                hint=connection.target.running(argv[0] or "python3", "--help"),
                node=connection.node,
            )
        return Completed(status, said, process.channel.stderr)


async def look(
    connection: Connection,
    program: str,
    *,
    env: Mapping[str, str] | None = None,
    home: str = "",
    python: str = "",
) -> Sight:
    """Look for a program, its version, and a hive that runs already; changes nothing there.

    Raises:
        SshError: the node cannot run rbee, or cannot be asked, in words.
    """
    wish = Wish([program], [], connection.lease, env=env or {}, home=home, python=python)
    async with connection.open_channel(LOADER, limit=2 * NOISE) as channel:
        said, _ = await _ask(connection, channel, wish, only_look=True)
    try:
        return codec.structure(said, Sight)
    except BadInputError as exc:
        raise SshError(
            f"the hive on node {connection.node} has told about itself what we do not understand: "
            f"{exc.message}",
            hint=f"rbee-keeper node install {connection.node}",
            node=connection.node,
        ) from exc


@asynccontextmanager
async def open_remote(
    connection: Connection, wish: Wish, *, first: Any = None, limit: int = NOISE
) -> AsyncGenerator[RemoteProcess, None]:
    """Run a program behind its guards on the node while the body runs.

    Leaving asks it to end, waits for its guards' grace, and leaves the rest to them; bounded, also
    when the node does not hear us. ``connection.fence`` then tells whether its end is certain.

    Args:
        first: called with the node's `Facts`, returns the line sent to the program at once.

    Raises:
        SshError: the node cannot run it, in words.
    """
    fence = connection.fence
    async with connection.open_channel(LOADER, limit=limit + NOISE) as channel:
        fence.note_start(wish.lease)
        try:
            said, rest = await _ask(connection, channel, wish)
            facts = Facts(**said)
            line = _start_line(wish, facts, first(facts) if first else "")
            channel.write(line.encode() + b"\n")
            async with _beating(connection, channel, wish.lease):
                yield RemoteProcess(connection, channel, facts, rest)
        finally:
            end = await _stop(connection, channel, wish)
            if not (end.lost or end.killed):
                fence.note_end()


async def _ask(
    connection: Connection, channel: Channel, wish: Wish, *, only_look: bool = False
) -> tuple[dict[str, Any], bytes]:
    """Run `rbee.ssh.boot` on the node; return what it answers, and what came after that."""
    marker = f"rbee-{secrets.token_hex(8)}"
    channel.write(_loaded() + _request(wish, marker, looks=only_look))
    with trio.move_on_after(ANSWER):
        kind, said, rest = await _read_answer(connection, channel, marker)
        if kind == "ready":
            return said, rest
        raise _refused(connection, said)
    raise LoginShellError(
        f"the login shell of node {connection.node} did not run our program within {ANSWER:g} s",
        hint=f"{connection.target.command} true",
        node=connection.node,
    )


def _request(wish: Wish, marker: str, *, looks: bool = False, wakes: bool = False) -> bytes:
    request = json.dumps(
        {
            "marker": marker,
            "minimum": MINIMUM,
            "patience": wish.lease,
            "python": wish.python,
            "program": wish.argv[0],
            "env": dict(wish.env),
            "home": wish.home,
            "log": wish.log,
            "run_dir": wish.run_dir,
            "bare": wish.bare,
            "look": looks,
            "wake": wakes,
            "guard": "" if looks else _source_of_guard(),
        }
    ).encode()
    return b"%d\n" % len(request) + request


async def _read_answer(
    connection: Connection, channel: Channel, marker: str
) -> tuple[str, dict[str, Any], bytes]:
    """Skip what the login shell says and return the marked line, and what follows it."""
    begin, data = f"\n{marker} ".encode(), b""
    while True:
        _, found, after = data.partition(begin)
        line, ended, rest = after.partition(b"\n")
        if found and ended:
            kind, _, text = line.decode().partition(" ")
            return kind, json.loads(text), rest
        more = await channel.read()
        if not more:
            raise _no_answer(connection, channel, await channel.wait(), data)
        data += more
        if not found and len(data) > NOISE:
            raise _no_answer(connection, channel, channel.end, data)


def _no_answer(connection: Connection, channel: Channel, end: End, said: bytes) -> SshError:
    node, target = connection.node, connection.target
    words = (said.decode("utf-8", "replace") + channel.stderr).strip()[-TAIL:]
    if end.lost and not words:
        return lost(connection)
    if end.status == 127 or ("python3" in words and "not found" in words):
        return RemotePythonError(
            f"node {node} has no python3 (needed: 3.{MINIMUM[1]} or newer): {words}",
            hint=f"{target.command} command -v python3",
            node=node,
        )
    how = "talks without end" if len(said) > NOISE else f"ended with code {end.status}"
    return LoginShellError(
        f"the login shell of node {node} {how} before our program ran: {words or '(no word)'}",
        hint=f"{target.command} true",
        node=node,
    )


def _refused(connection: Connection, said: dict[str, str]) -> SshError:
    node, had = connection.node, said["had"]
    if said["kind"] == "python":
        return RemotePythonError(
            f"node {node} has no Python {MINIMUM[0]}.{MINIMUM[1]} or newer, found: {had}",
            hint=f"{connection.target.command} python3 --version",
            node=node,
        )
    if said["kind"] == "program":
        return RemoteProgramError(
            f"node {node} has no program {had}", hint=f"rbee-keeper node install {node}", node=node
        )
    return RemoteMachineError(
        f"node {node} cannot be used as it is: {had}",
        hint=f"{connection.target.command} df -h",
        node=node,
    )


def lost(connection: Connection) -> ConnectionLostError:
    """Say that the connection is gone and what that means for the node."""
    return ConnectionLostError(
        f"the connection to node {connection.node} is lost; what ran there ends by its lease",
        hint=f"rbee-keeper node check {connection.node}",
        node=connection.node,
    )


def _start_line(wish: Wish, facts: Facts, first: str) -> str:
    argv = [facts.program, *wish.argv[1:]]
    if wish.bare:
        argv = [facts.python, "-I", "-S", "-c", BARE, *argv]
    return guard_lines(
        argv,
        first=first,
        graces=wish.graces,
        log_file=Path(facts.log),
        run_dir=Path(facts.run_dir) if facts.run_dir else None,
        lease=wish.lease,
        adopt_grace=wish.adopt_grace,
        hold_interrupt=not wish.bare,
        clock="boottime",  # a node that slept has not heard of us meanwhile
        guard_argv=[facts.python, "-I", "-S", "-c", _source_of_guard()],
    )


@asynccontextmanager
async def _beating(
    connection: Connection, channel: Channel, lease: float
) -> AsyncGenerator[None, None]:
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_beating, connection, channel, lease / 5)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel(reason="the body ended")
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:  # the beats' nursery is no business of the caller's
            raise group.exceptions[0] from None
        raise


async def _keep_beating(connection: Connection, channel: Channel, every: float) -> None:
    """Beat from trio's own thread: an owner that is stuck has no claim to his lease."""
    number = 0
    while True:
        number += 1
        channel.write(b"beat %d\n" % number)
        connection.fence.note_beat()
        await trio.sleep(every)


async def _stop(connection: Connection, channel: Channel, wish: Wish) -> End:
    """Ask it to end and wait for the guard's word; bounded, the guards need no help."""
    channel.discard_output()
    channel.write(b"stop\n")
    channel.write_eof()
    with trio.move_on_after(wish.graces[0] + TOLD, shield=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_wake_after, PATIENCE, connection, wish)
            end = await channel.wait()
            nursery.cancel_scope.cancel(reason="it has ended")
        return end
    log.warning("node %s does not tell whether its program has ended", channel.node)
    return End(lost=True)


async def _wake_after(seconds: float, connection: Connection, wish: Wish) -> None:
    """Wake what came over this connection: a guard that is frozen has not heard that it ends."""
    await trio.sleep(seconds)
    try:
        async with connection.open_channel(LOADER, limit=NOISE) as channel:
            channel.discard_output()
            channel.write(_loaded() + _request(wish, "", wakes=True))
            await channel.wait()
    except (SshError, *failures.FOREIGN) as exc:  # `_stop` is to hear the end all the same
        log.debug("cannot wake what may be frozen on node %s: %s", connection.node, exc)


@cache
def _source_of_guard() -> str:
    return inspect.getsource(guard)


@cache
def _loaded() -> bytes:
    return json.dumps(inspect.getsource(boot)).encode() + b"\n"
