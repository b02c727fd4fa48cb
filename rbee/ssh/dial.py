"""From a target to logged-in SSH connections, hop by hop.

This module, `rbee.ssh.connection` and `rbee.ssh.failures` are the ones that know asyncssh.
Sockets are made by trio, not by asyncio: a name that does not resolve cannot hold up the end of
the program, errors are plain ``OSError``, and we hold the socket that an abort has to reset.
"""

from __future__ import annotations

import shlex
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncssh
import attrs
import trio

from rbee.aio import Aio
from rbee.ssh import failures
from rbee.ssh.errors import (
    ChangedHostKeyError,
    SshConfigError,
    SshError,
    SshKeyError,
    UnknownHostKeyError,
    UnreachableError,
)
from rbee.ssh.host_keys import HostKey, known_name
from rbee.ssh.target import SshTarget

MAX_HOPS = 8
HUNG_UP = (asyncssh.KeyExchangeFailed, asyncssh.ConnectionLost, ConnectionError)
KNOWN_HOSTS = "~/.ssh/known_hosts"
SYSTEM_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts"
UNREADABLE = (RuntimeError, IndexError)  # for a path: the ~ of nobody, the root as a pattern
Reached = Callable[[str, int], None]


@attrs.define(eq=False)
class Line:
    """The connections to a node, the outermost hop first, and the socket below them all.

    ``address``: of the first machine, as long as the socket may be closed already.
    """

    connections: list[Any] = attrs.field(factory=list)
    sock: socket.socket | None = None
    address: str = ""

    @property
    def last(self) -> Any:
        return self.connections[-1]


@attrs.define(eq=False)
class Dialler:
    """One try to reach a target; what it has opened so far is always in ``line``.

    ``reached`` is told address and port of the first machine on the way once it answers.
    """

    _aio: Aio
    _target: SshTarget
    _lease: float
    _reached: Reached | None = None
    line: Line = attrs.field(factory=Line)

    async def dial(self) -> None:
        """Log in to the target, through its jump hosts.

        Raises:
            SshError: it cannot be done; what is open is in ``line`` still.
        """
        target = self._target
        _check_keys(target)
        with trio.move_on_after(target.connect_limit):
            await self._reach(target.host, target.port, target.user, target.keys, 0)
            return
        raise UnreachableError(
            f"node {target.node}: {target.host} did not let us in within "
            f"{target.connect_limit:g} s: its network or its sshd does not answer",
            hint=f"{target.command} -v true",
            node=target.node,
        )

    def take(self) -> Line:
        """Hand over what is open; the dialler owns nothing any more."""
        line, self.line = self.line, Line()
        return line

    async def _reach(
        self, host: str, port: int | None, user: str | None, keys: tuple[Path, ...], depth: int
    ) -> None:
        if depth > MAX_HOPS:
            raise SshConfigError(
                f"node {self._target.node}: ProxyJump goes through more than {MAX_HOPS} hosts",
                hint=f"ssh -G {host}",
                node=self._target.node,
            )
        given = self._options(host, port, user, keys)
        options = await self._aside(asyncssh.SSHClientConnectionOptions.construct, given)
        if not self.line.connections and isinstance(options.tunnel, str):
            for hop in options.tunnel.split(","):
                await self._reach(*_hop(hop), (), depth + 1)
        files = self._known_hosts_files(options)
        given["known_hosts"] = known = _read_all(files)
        client = _Client(known, files[0])
        try:
            await self._log_in_as_known(options, given, client)
        except asyncssh.HostKeyNotVerifiable as exc:
            raise self._untrusted(exc, client, options) from exc
        except failures.FOREIGN as exc:
            raise failures.refused(exc, self._target, options.host) from exc

    async def _log_in_as_known(self, options: Any, given: dict[str, Any], client: _Client) -> None:
        """Ask for the kinds of host key that are known, as ssh does; then for whatever there is."""
        try:
            await self._log_in(options, given, client)
        except HUNG_UP:  # with what is known the two found no common kind, perhaps
            if not client.connected or client.offered or not client.knows(options):
                raise
            given["server_host_key_algs"] = "default"
            await self._log_in(options, given, client)

    def _options(
        self, host: str, port: int | None, user: str | None, keys: tuple[Path, ...]
    ) -> dict[str, Any]:
        """Collect what asyncssh is told; what is not said here is the ssh_config's."""
        target = self._target
        given: dict[str, Any] = {
            "host": host,
            "ignore_encrypted": True,  # the agent may hold such a key
            "keepalive_interval": self._lease / 5,
            "keepalive_count_max": 4,
            "connect_timeout": None,
            "login_timeout": target.connect_limit,
            "password_auth": False,
            "kbdint_auth": False,
            "agent_forwarding": False,
            "x11_forwarding": False,
            "command": None,
            "request_pty": False,
            "encoding": None,
            "config": [str(target.config)] if target.config else (),  # the user's own
        }
        if port is not None:
            given["port"] = port
        if user is not None:
            given["username"] = user
        if keys:
            given["client_keys"] = [str(key) for key in keys]
        if target.agent is not None:
            given["agent_path"] = target.agent or None
        return given

    async def _aside(self, construct: Any, given: dict[str, Any]) -> Any:
        """Read the ssh_config."""

        async def read() -> Any:
            return await construct(None, **given)

        try:
            return await self._aio.call(read)
        except (*UNREADABLE, OSError, ValueError, asyncssh.Error) as exc:
            raise self._unusable(exc, given["host"]) from exc

    def _unusable(self, exc: Exception, host: str) -> SshConfigError:
        return SshConfigError(
            f"node {self._target.node}: the SSH configuration cannot be used: {exc}",
            hint=f"ssh -G {shlex.quote(host)}",
            node=self._target.node,
        )

    async def _log_in(self, options: Any, given: dict[str, Any], client: _Client) -> None:
        way = self.line.connections
        if way:
            given["tunnel"] = way[-1]
        elif not options.proxy_command:
            if self.line.sock is not None:
                self.line.sock.close()
            self.line.sock = given["sock"] = await self._connect(options.host, options.port)
            given["tunnel"] = None
            if self._reached is not None:
                self._reached(*self.line.sock.getpeername()[:2])

        async def connect() -> None:
            # Stored before the next await: a connection has an owner at every moment.
            way.append(await asyncssh.connect(client_factory=lambda: client, **given))

        await self._aio.call(connect)

    async def _connect(self, host: str, port: int) -> socket.socket:
        stream = await trio.open_tcp_stream(host, port)
        inner = stream.socket
        self.line.address = str(inner.getpeername()[0])
        sock = socket.socket(inner.family, inner.type, inner.proto, inner.detach())
        sock.setblocking(False)
        with suppress(OSError, AttributeError):  # where there is no such option
            # A beat that could not be delivered within the lease must never arrive.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._lease * 1000))
        return sock

    # host keys ---------------------------------------------------------------------------------
    def _known_hosts_files(self, options: Any) -> list[Path]:
        """Return the files to read, the user's own first; each kind has its own default."""
        if self._target.known_hosts:
            return [self._target.known_hosts]
        names = [
            *(options.config.get("UserKnownHostsFile") or [KNOWN_HOSTS]),
            *options.config.get("GlobalKnownHostsFile", [SYSTEM_KNOWN_HOSTS]),
        ]
        try:
            return [Path(name).expanduser() for name in names]
        except UNREADABLE as exc:
            raise self._unusable(exc, options.host) from exc

    def _untrusted(self, exc: Exception, client: _Client, options: Any) -> SshError:
        if client.offered is None:
            return failures.refused(exc, self._target, options.host)
        if client.knows(options):
            return self._changed(client.offered)
        key = client.offered
        return UnknownHostKeyError(
            f"node {self._target.node}: nobody has vouched for the host key of {key.host} yet; "
            f"it offers {key.fingerprint}",
            key=key,
            file=client.file,
            hint=f"{self._target.command} true   # shows the same fingerprint and asks",
            node=self._target.node,
        )

    def _changed(self, key: HostKey) -> ChangedHostKeyError:
        return ChangedHostKeyError(
            f"node {self._target.node}: the host key of {key.host} is not the one that is known: "
            f"it offers {key.fingerprint}. Another machine may answer in its place",
            hint=f"ssh-keygen -R '{key.host}'   # only if you know why it changed",
            node=self._target.node,
        )


class _Client(asyncssh.SSHClient):  # type: ignore[misc]
    """Remembers the host key that asyncssh does not trust."""

    def __init__(self, known: bytes, file: Path) -> None:
        self._known = known
        self.file = file
        self._seen: tuple[str, str, int] | None = None
        self._peer = ""
        self.offered: HostKey | None = None
        self.connected = False

    def connection_made(self, conn: Any) -> None:
        self.connected = True
        peer = conn.get_extra_info("peername")
        self._peer = peer[0] if peer else ""

    def validate_host_public_key(self, host: str, addr: str, port: int, key: Any) -> bool:
        self._seen = host, addr, port
        public = " ".join(key.export_public_key().decode().split()[:2])
        self.offered = HostKey(known_name(host, port), public, key.get_fingerprint())
        return False

    def knows(self, options: Any) -> bool:
        """Tell whether there is any key for this host."""
        host, addr, port = self._seen or (
            options.host_key_alias or options.host, self._peer, options.port,
        )  # fmt: skip
        try:
            found = asyncssh.match_known_hosts(
                self._known, host, addr, None if port == 22 else port
            )
        except ValueError:
            return False
        return any(found[:3])  # keys, authorities, revoked keys


def _hop(text: str) -> tuple[str, int | None, str | None]:
    """Take ``[user@]host[:port]`` apart."""
    user, _, place = text.strip().rpartition("@")
    host, _, port = place.rpartition(":") if place.count(":") == 1 else (place, "", "")
    return host, int(port) if port.isdigit() else None, user or None


def _read_all(files: list[Path]) -> bytes:
    """Read the known_hosts files: none is no reason to fail, nor to trust anybody."""
    texts = []
    for file in files:
        with suppress(OSError):
            texts.append(file.read_bytes())
    return b"\n".join(texts) + b"\n"


def _check_keys(target: SshTarget) -> None:
    for key in target.keys:
        try:
            found = key.stat()
            key.open("rb").close()
        except OSError as exc:
            raise SshKeyError(
                f"node {target.node}: the key file {key} cannot be read: {exc.strerror}",
                hint=f"ls -l {shlex.quote(str(key.parent))}",
                node=target.node,
            ) from exc
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise SshKeyError(
                f"node {target.node}: the key file {key} may be read by others (mode "
                f"{stat.S_IMODE(found.st_mode):04o}, needed 0600), SSH does not use such a key",
                hint=f"chmod 600 {shlex.quote(str(key))}",
                node=target.node,
            )
