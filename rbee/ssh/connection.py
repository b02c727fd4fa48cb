"""One SSH connection to a node as a scope, with what runs over it: channels, files, forwards.

Leaving never hangs, partition or not: if all that ran on the node is known to be gone, the
connection says good-bye, else it is reset at once, so that nothing we sent arrives late.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import asyncssh
import attrs
import trio

from rbee.aio import Aio, Outbox
from rbee.errors import leaves
from rbee.ssh import failures
from rbee.ssh.dial import Dialler, Line, Reached
from rbee.ssh.errors import SshError, TransferError, UnreachableError
from rbee.ssh.fence import Fence
from rbee.ssh.target import LEASE, SshTarget

log = logging.getLogger(__name__)

T = TypeVar("T")

WAITS = (0.0, 0.2, 0.4)  # seconds before each try
CLOSE = 0.5  # seconds for a polite good-bye
DRAIN = 2.0  # seconds for the output that the exit status has overtaken
STDERR_TAIL = 64 * 1024
BLOCK = 128 * 1024
# as whichever of its tasks or our writes notices first says it
GONE = (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, ConnectionError)
CHUNK = 32 * BLOCK  # on its way at one time


class Connection:
    """A logged-in connection to a node; made by `open_connection`."""

    def __init__(self, target: SshTarget, lease: float, aio: Aio, line: Line, fence: Fence) -> None:
        self.target = target
        self.lease = lease
        self.fence = fence
        self._aio = aio
        self._line = line

    @property
    def node(self) -> str:
        return self.target.node

    @property
    def address(self) -> str:
        """Where the node is reached over IP; "" if only its jump host knows."""
        line = self._line
        return "" if len(line.connections) > 1 else line.address

    @property
    def user(self) -> str:
        """Whom we are logged in as."""
        return str(self._line.last.get_extra_info("username"))

    @asynccontextmanager
    async def open_channel(self, command: str, *, limit: int) -> AsyncGenerator[Channel, None]:
        """Run a constant command string on the node; leaving closes its channel.

        What is not constant goes through the channel's input: a login shell reads the command.

        Args:
            limit: bytes of output that are kept; what comes beyond is lost, and noted.

        Raises:
            ConnectionLostError: the connection is gone.
        """
        channel = Channel(self.node, self._aio, limit)
        try:
            await self._call(channel._open, self._line.last, command)
            yield channel
        finally:
            channel.close()

    async def wait_lost(self) -> SshError:
        """Wait until the connection is gone and return why."""
        await self._aio.call(self._line.last.wait_closed)
        return failures.lost(None, self.node)

    # files -------------------------------------------------------------------------------------
    async def put(
        self, local: Path, remote: str, *, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Copy a file to the node, over whatever is there.

        ``progress`` is told the bytes done and the bytes in all. Cancelling leaves a part of it.

        Raises:
            TransferError: it cannot be read here or written there.
        """
        await self._transfer("put", str(local), remote, progress)

    async def get(
        self, remote: str, local: Path, *, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Copy a file from the node; otherwise as `put`."""
        await self._transfer("get", remote, str(local), progress)

    async def put_rest(
        self,
        local: Path,
        remote: str,
        offset: int,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Copy a file from ``offset`` on, behind what the node has of it; otherwise as `put`.

        Whether what it has is the same is the caller's to check; so is what a cut has left: the
        last `CHUNK` may have come with gaps.

        Raises:
            ConnectionLostError: the connection is gone.
        """
        await self._transfer("put", str(local), remote, progress, offset=offset)

    async def rename(self, old: str, new: str) -> None:
        """Give a file on the node another name, in one step, over whatever has it.

        Raises:
            TransferError: it cannot be done there.
        """

        async def rename() -> None:
            async with self._line.last.start_sftp_client() as sftp:
                await sftp.posix_rename(old, new)

        try:
            await self._call(rename)
        except (asyncssh.SFTPError, OSError) as exc:
            raise TransferError(
                f"cannot rename {old} to {new} (node {self.node}): {exc}",
                hint=f"{self.target.command} df -h",
                node=self.node,
            ) from exc

    async def _transfer(
        self,
        verb: str,
        source: str,
        target: str,
        progress: Callable[[int, int], None] | None,
        *,
        offset: int | None = None,
    ) -> None:
        told = self._aio.outbox()

        def tell(_from: bytes, _to: bytes, done: int, total: int) -> None:
            told.put((done, total))

        async def copy() -> None:
            async with self._line.last.start_sftp_client() as sftp:
                if offset is not None:
                    await _send_rest(sftp, source, target, offset, told)
                    return
                await getattr(sftp, verb)(
                    source, target, block_size=BLOCK, progress_handler=tell if progress else None
                )

        failed: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                if progress is not None:
                    nursery.start_soon(_relay, told, progress)
                await self._call(copy)
                await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel(reason="the file is copied")
        except* (asyncssh.SFTPError, asyncssh.ChannelOpenError, OSError, SshError) as group:
            failed = next(leaves(group))
        # bare: what is raised in there comes out as a group
        if isinstance(failed, SshError):
            raise failed
        if isinstance(failed, GONE):
            raise failures.lost(failed, self.node) from failed
        if failed is not None:
            raise TransferError(
                f"cannot {verb} {source} as {target} (node {self.node}): {failed}",
                hint=f"{self.target.command} df -h",
                node=self.node,
            ) from failed

    # forwards ----------------------------------------------------------------------------------
    @asynccontextmanager
    async def open_forward(self, host: str, port: int) -> AsyncGenerator[int, None]:
        """Yield a port of our loopback that leads to ``host:port`` as the node sees it."""
        async with self._listening(
            self._line.last.forward_local_port, "127.0.0.1", 0, host, port
        ) as listening:
            yield listening

    @asynccontextmanager
    async def open_reverse_forward(self, host: str, port: int) -> AsyncGenerator[int, None]:
        """Yield a port of the node's loopback that leads to ``host:port`` as we see it."""
        async with self._listening(
            self._line.last.forward_remote_port, "127.0.0.1", 0, host, port
        ) as listening:
            yield listening

    @asynccontextmanager
    async def _listening(
        self, forward: Callable[..., Awaitable[Any]], *args: Any
    ) -> AsyncGenerator[int, None]:
        if self._line.last.is_closed():  # asyncssh would listen all the same
            raise failures.lost(None, self.node)
        listeners: list[Any] = []

        async def listen() -> None:
            listeners.append(await forward(*args))

        try:
            try:
                await self._call(listen)
            except OSError as exc:  # of ours: no more descriptors, no more ports
                raise SshError(
                    f"no port can be forwarded to node {self.node}: {exc.strerror or exc}",
                    hint="ulimit -n 65536",
                    node=self.node,
                ) from exc
            yield listeners[0].get_port()
        finally:
            for listener in listeners:
                self._aio.soon(listener.close)

    async def _call(self, async_fn: Callable[..., Awaitable[T]], *args: Any) -> T:
        try:
            return await self._aio.call(async_fn, *args)
        except asyncssh.SFTPError:
            raise
        except (asyncssh.DisconnectError, asyncssh.ChannelOpenError) as exc:
            if isinstance(exc, asyncssh.ChannelOpenError) and not self._line.last.is_closed():
                raise SshError(
                    f"the sshd of node {self.node} refuses: {exc.reason}",
                    hint=f"{self.target.command} -v true",
                    node=self.node,
                ) from exc
            raise failures.lost(exc, self.node) from exc
        except OSError as exc:  # what waits for a reply gets the socket's own error
            if not self._line.last.is_closed():
                raise
            raise failures.lost(exc, self.node) from exc
        except asyncssh.ChannelListenError as exc:
            raise SshError(
                f"the sshd of node {self.node} refuses to forward a port: {exc}",
                hint=self.target.sees_forwarding,
                node=self.node,
            ) from exc


async def _send_rest(
    sftp: Any, source: str, target: str, offset: int, told: Outbox[tuple[int, int]]
) -> None:
    fd = os.open(source, os.O_RDONLY)
    try:
        total = os.fstat(fd).st_size
        flags = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT  # as it is: neither emptied nor appended to
        async with sftp.open(target, flags, encoding=None, block_size=0) as there:
            while data := await asyncio.to_thread(os.pread, fd, CHUNK, offset):
                await _write(there, data, offset)
                offset += len(data)
                told.put((offset, total))
    finally:
        os.close(fd)


async def _write(there: Any, data: bytes, offset: int) -> None:
    """Write in several requests at a time, and see the end of each: asyncssh's own leaves some."""
    at = range(0, len(data), BLOCK)
    writes = [there.write(data[begin : begin + BLOCK], offset + begin) for begin in at]
    for failed in await asyncio.gather(*writes, return_exceptions=True):
        if isinstance(failed, BaseException):
            raise failed


async def _relay(told: Outbox[tuple[int, int]], progress: Callable[[int, int], None]) -> None:
    while True:
        for done, total in await told.take():
            progress(done, total)


@attrs.frozen
class End:
    """How a command on the node ended; ``status`` is 128 + n for a signal, -1 if unknown.

    ``killed``: a signal ended the command itself, so what it was to clean up may be there still.
    """

    status: int = -1
    lost: bool = False
    killed: bool = False


class Channel(asyncssh.SSHClientSession):  # type: ignore[misc]
    """One command on the node, used from trio; the callbacks run in the asyncio thread.

    Output keeps its order and comes before the end, whatever the exit status overtakes.
    """

    def __init__(self, node: str, aio: Aio, limit: int) -> None:
        self.node = node
        self.overflowed = False
        self._aio = aio
        self._left = limit
        self._output: Outbox[bytes | None] = aio.outbox()
        self._stderr = bytearray()
        self._chan: Any = None
        self._status: int | None = None
        self._closed: asyncio.Event | None = None
        self._lost = False
        self._killed = False
        self._ended = False

    async def read(self) -> bytes:
        """Return the next output, b"" at its end."""
        if self._ended:
            return b""
        chunks = await self._output.take()
        self._ended = chunks[-1] is None
        return b"".join(chunk for chunk in chunks if chunk)

    async def wait(self) -> End:
        """Wait until the command has ended or the connection is gone."""
        assert self._closed is not None
        await self._aio.call(self._closed.wait)
        return self.end

    @property
    def end(self) -> End:
        return End(-1 if self._status is None else self._status, self._lost, self._killed)

    @property
    def stderr(self) -> str:
        return bytes(self._stderr).decode("utf-8", "replace")

    def write(self, data: bytes) -> None:
        """Send; what cannot be sent any more is lost, and `wait` tells."""
        self._aio.soon(self._send, "write", data)

    def write_eof(self) -> None:
        self._aio.soon(self._send, "write_eof")

    def discard_output(self) -> None:
        """Take no more output: a flooding daemon must fill nobody's memory."""
        self._left = 0

    def close(self) -> None:
        self._aio.soon(self._send, "abort")

    # in the asyncio thread ---------------------------------------------------------------------
    async def _open(self, connection: Any, command: str) -> None:
        self._closed = asyncio.Event()
        await connection.create_session(lambda: self, command, encoding=None)

    def _send(self, verb: str, *args: Any) -> None:
        if self._chan is not None:
            with suppress(OSError, asyncssh.Error):
                getattr(self._chan, verb)(*args)

    def connection_made(self, chan: Any) -> None:
        self._chan = chan

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype == asyncssh.EXTENDED_DATA_STDERR:
            self._stderr += data
            del self._stderr[:-STDERR_TAIL]
            return
        kept = data[: self._left]
        self.overflowed = self.overflowed or len(kept) < len(data)
        self._left -= len(kept)
        if kept:
            self._output.put(kept)

    def exit_status_received(self, status: int) -> None:
        self._status = status
        # What the login shell has left in the background may hold the channel open for ever.
        asyncio.get_running_loop().call_later(DRAIN, self._send, "abort")

    def exit_signal_received(self, name: str, core: bool, message: str, lang: str) -> None:
        self._status, self._killed = 128 + _signal_number(name), True

    def eof_received(self) -> bool:
        return True  # the other direction stays open: it is the lifeline

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = exc is not None or self._status is None
        self._output.put(None)
        if self._closed is not None:
            self._closed.set()


def _signal_number(name: str) -> int:
    try:
        return int(signal.Signals[f"SIG{name}"])
    except KeyError:
        return 0


@asynccontextmanager
async def open_connection(
    target: SshTarget,
    aio: Aio,
    *,
    lease: float = LEASE,
    fence: Fence | None = None,
    reached: Reached | None = None,
) -> AsyncGenerator[Connection, None]:
    """Log in to a node while the body runs; a dead connection is noticed within ``lease``.

    Three tries if the node is not reached, one if it does not let us in.

    Args:
        fence: notes when our last word may have reached the node; also after the body.
        reached: called with address and port of the first machine on the way, in each try that
            comes so far, before the login.

    Raises:
        UnknownHostKeyError: nobody has vouched for the node's key yet.
        SshError: whatever else, in words; the network, the node, keys, the ssh_config.
    """
    fence = fence or Fence()
    line = Line()
    try:
        line = await _dial(target, aio, lease, reached)
        yield Connection(target, lease, aio, line, fence)
    finally:
        await _close(aio, line, polite=not fence.is_up)
        fence.note_closed()


async def _dial(target: SshTarget, aio: Aio, lease: float, reached: Reached | None) -> Line:
    error: UnreachableError | None = None
    for wait in WAITS:
        await trio.sleep(wait)
        dialler = Dialler(aio, target, lease, reached)
        try:
            await dialler.dial()
        except UnreachableError as exc:
            log.info("%s", exc)
            error = exc
        else:
            return dialler.take()
        finally:
            await _close(aio, dialler.line, polite=False)
    assert error is not None
    raise error


async def _close(aio: Aio, line: Line, *, polite: bool) -> None:
    """Close what is open, in bounded time."""
    if line.connections:
        # Cleanup: bounded inside; the outer bound is for an asyncio thread that is stuck.
        with trio.move_on_after(CLOSE * 4, shield=True):
            await aio.call(_close_all, line, polite)
    if line.sock is not None:
        line.sock.close()


async def _close_all(line: Line, polite: bool) -> None:
    if polite:
        for connection in reversed(line.connections):
            connection.close()
        await _wait_closed(line)
    if not polite and line.sock is not None:
        with suppress(OSError):  # closed already
            # Reset: neither we nor the kernel send what is still unsent.
            line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for connection in line.connections:
        connection.abort()
    await _wait_closed(line)


async def _wait_closed(line: Line) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(CLOSE):
            for connection in reversed(line.connections):
                await connection.wait_closed()
