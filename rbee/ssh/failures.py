"""asyncssh's and the system's errors, said in our words."""

from __future__ import annotations

import os
import shlex
import socket
from pathlib import Path

import asyncssh

from rbee.aio import AioCancelledError
from rbee.errors import leaves
from rbee.ssh.errors import (
    ConnectionLostError,
    HostKeyError,
    SshAuthError,
    SshConfigError,
    SshError,
    SshKeyError,
    UnreachableError,
)
from rbee.ssh.target import SshTarget

FOREIGN = (asyncssh.Error, OSError, ValueError, TimeoutError, AioCancelledError)
DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


def refused(exc: BaseException, target: SshTarget, host: str) -> SshError:
    """Say why a connection did not come up."""
    node, via = target.node, f"{target.command} -v true"
    if isinstance(exc, asyncssh.PermissionDenied):
        return _not_let_in(target, host)
    if isinstance(exc, asyncssh.HostKeyNotVerifiable):
        return HostKeyError(f"node {node}: {exc.reason}", hint=via, node=node)
    if isinstance(exc, socket.gaierror):
        return UnreachableError(
            f"node {node}: the name {host!r} has no address: {exc.strerror}",
            hint=f"getent hosts {host}",
            node=node,
        )
    if isinstance(exc, asyncssh.ChannelOpenError):  # the jump host could not reach it
        return UnreachableError(
            f"node {node}: the jump host does not get through to {host}: {exc.reason}",
            hint=via,
            node=node,
        )
    if isinstance(exc, OSError):
        return UnreachableError(
            f"node {node}: {host} is not reached by SSH: {_words(exc)}", hint=via, node=node
        )
    if isinstance(exc, asyncssh.ConnectionLost | AioCancelledError):
        return UnreachableError(
            f"node {node}: {host} hung up before we were logged in", hint=via, node=node
        )
    if isinstance(exc, ValueError):  # a bad file that the ssh_config names
        return SshConfigError(
            f"node {node}: the SSH configuration cannot be used: {exc}",
            hint=f"ssh -G {host}",
            node=node,
        )
    return SshError(f"node {node}: {host} and we found no common SSH: {exc}", hint=via, node=node)


def _not_let_in(target: SshTarget, host: str) -> SshError:
    user = f"user {target.user}" if target.user else "this user"
    for key in target.keys or _default_keys():
        if is_encrypted(key):
            return SshKeyError(
                f"node {target.node}: {host} did not let {user} in; the key {key} is encrypted "
                "and no SSH agent holds it",
                hint=f"ssh-add {shlex.quote(str(key))}",
                node=target.node,
            )
    keys = ", ".join(map(str, target.keys)) or "the agent's keys and those in ~/.ssh"
    return SshAuthError(
        f"node {target.node}: {host} did not let {user} in; offered: {keys}",
        hint=f"{target.command} -v true",
        node=target.node,
    )


def _default_keys() -> list[Path]:
    return [Path("~/.ssh", name).expanduser() for name in DEFAULT_KEYS]


def is_encrypted(key: Path) -> bool:
    """Tell whether a private key file needs a passphrase."""
    try:
        asyncssh.read_private_key(key)
    except asyncssh.KeyImportError as exc:
        return "passphrase" in str(exc).lower()
    except (OSError, ValueError):
        return False
    return False


def lost(exc: BaseException | None, node: str) -> ConnectionLostError:
    """Say that a connection which stood is gone."""
    why = f": {_words(exc)}" if exc is not None and _words(exc) else ""
    return ConnectionLostError(
        f"the connection to node {node} is lost{why}",
        hint=f"rbee-keeper node check {node}",
        node=node,
    )


def _words(exc: BaseException) -> str:
    if isinstance(exc, asyncssh.Error):
        return str(exc.reason)
    if isinstance(exc.__cause__, BaseExceptionGroup):  # one failure per address of the host
        return "; ".join(dict.fromkeys(_words(leaf) for leaf in leaves(exc.__cause__)))
    if isinstance(exc, OSError) and exc.strerror and exc.errno:
        return os.strerror(exc.errno)
    return str(exc)
