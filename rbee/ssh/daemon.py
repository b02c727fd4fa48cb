"""An owned daemon on a node: what `rbee.process.open_daemon` is here, over an SSH channel."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager

import attrs
import trio

from rbee.errors import BadInputError, ChildExitedError, PeerError, RbeeError, from_wire
from rbee.process import how_ended
from rbee.ssh.connection import Connection
from rbee.ssh.errors import NoHelloError, RemoteProgramError, SshError
from rbee.ssh.remote import Facts, RemoteProcess, Wish, open_remote, run
from rbee.wire import codec
from rbee.wire.messages import DaemonStart, ErrorDetail, Hello

HELLO = 60.0  # seconds for a daemon to say that it serves
FETCH = 5.0
LOG_TAIL = 2000
MAX_HELLO = 64 * 1024


@attrs.define(eq=False)
class RemoteDaemon:
    """An owned daemon on a node that said hello."""

    process: RemoteProcess
    hello: Hello

    @property
    def log(self) -> str:
        """Where its log is on the node."""
        return self.process.facts.log

    async def wait(self) -> int:
        """Return its exit code once it has ended.

        Raises:
            ConnectionLostError: nobody knows; its lease ends it.
        """
        return await self.process.wait()

    async def ended(self, status: int) -> RbeeError:
        """Make the error for an end that nobody asked for, with the log's tail."""
        return await _ended(self.process, self.hello.component, status)


@asynccontextmanager
async def open_remote_daemon(
    connection: Connection,
    argv: Sequence[str],
    start: DaemonStart,
    *,
    graces: Sequence[float],
    log_file: str,
    home: str = "",
    env: Mapping[str, str] | None = None,
    adopt_grace: float = 0.0,
    python: str = "",
    reachable: bool = False,
    hello_limit: float = HELLO,
) -> AsyncGenerator[RemoteDaemon, None]:
    """Own a daemon on the node while the body runs; it has said hello before the body starts.

    Paths are the node's own. A bare name as ``start.run_dir`` is put below the run directory of
    ``home`` there, one as ``log_file`` into its logs.

    Args:
        reachable: have it listen where SSH has reached the node, not on loopback only.

    Raises:
        RbeeError: the daemon said why it cannot start.
        ChildExitedError: it ended without a word; ``details['log']`` is its log's tail.
        NoHelloError: it is silent.
        SshError: the node cannot run it, in words.
    """

    def first(facts: Facts) -> str:
        host = facts.address if reachable else start.host
        told = attrs.evolve(start, run_dir=facts.run_dir, host=host)
        return f"start {codec.dumps(told).decode()}"

    wish = Wish(
        argv, graces, start.lease, env=env or {}, home=home, log=log_file, run_dir=start.run_dir,
        python=python, adopt_grace=adopt_grace,
    )  # fmt: skip
    async with open_remote(connection, wish, first=first, limit=MAX_HELLO) as process:
        hello = await _wait_hello(process, hello_limit)
        process.channel.discard_output()
        yield RemoteDaemon(process, hello)


async def _wait_hello(process: RemoteProcess, limit: float) -> Hello:
    with trio.move_on_after(limit):
        return await _read_hello(process)
    node, where = process.connection.node, process.facts.log
    tail = await fetch_tail(process.connection, where)
    raise NoHelloError(
        f"node {node} answers, but {process.facts.program} did not say within {limit:g} s that it "
        "serves",
        hint=_tail_command(process),
        node=node,
        log=tail,
    )


async def _read_hello(process: RemoteProcess) -> Hello:
    node, data = process.connection.node, b""
    while b"\n" not in data:
        more = await process.read()
        if not more:
            raise await _ended(process, process.facts.program, await process.wait())
        data += more
        if len(data) > MAX_HELLO:
            break
    line = data.partition(b"\n")[0].decode("utf-8", "replace")
    kind, _, text = line.partition(" ")
    try:
        if kind == "hello":
            return codec.loads(text, Hello)
        if kind == "error":
            raise _said(node, codec.loads(text, ErrorDetail))
    except BadInputError as exc:
        if kind == "error":
            raise
        raise _nonsense(process, line) from exc
    raise _nonsense(process, line)


def _said(node: str, error: ErrorDetail) -> RbeeError:
    return from_wire(
        error.code, f"node {node}: {error.message}", hint=error.hint, details=error.details
    )


def _nonsense(process: RemoteProcess, line: str) -> PeerError:
    return SshError(
        f"{process.facts.program} on node {process.connection.node} said {line[:80]!r}, "
        "expected was its hello",
        hint=_tail_command(process),
        node=process.connection.node,
    )


async def _ended(process: RemoteProcess, what: str, status: int) -> RbeeError:
    node = process.connection.node
    tail = await fetch_tail(process.connection, process.facts.log)
    missing = [line for line in tail.splitlines() if "No module named" in line]
    if missing:
        return RemoteProgramError(
            f"node {node} cannot run {what}: {missing[-1]}",
            hint=f"rbee-keeper node install {node}",
            node=node,
            log=tail,
        )
    return ChildExitedError(
        f"{what} on node {node} ended unasked with {how_ended(status)}",
        hint=_tail_command(process),
        node=node,
        log=tail,
    )


def _tail_command(process: RemoteProcess) -> str:
    return process.connection.target.running("tail", "-n", "50", process.facts.log)


async def fetch_tail(connection: Connection, path: str, size: int = LOG_TAIL) -> str:
    """Return the last lines of a file on the node, "" if they cannot be had."""
    with trio.move_on_after(FETCH):
        try:
            done = await run(connection, ["tail", "-c", str(size), path], limit=size + 1)
        except SshError:
            return ""
        return done.stdout.decode("utf-8", "replace")
    return ""
