"""What can go wrong on the way to a node and on it; every error names the node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rbee.errors import PeerError
from rbee.ssh.host_keys import HostKey


class SshError(PeerError):
    """Something on the way to a node failed; ``details['node']`` names the node."""

    code = "ssh"


class UnreachableError(SshError):
    """No answer: the name, the address, the port or the network."""

    code = "unreachable"
    http_status = 503


class SshAuthError(SshError):
    """The node does not let this user in with these keys."""

    code = "ssh_auth"


class SshKeyError(SshError):
    """A private key that cannot be used: missing, readable by others, encrypted."""

    code = "ssh_key"
    http_status = 400


class SshConfigError(SshError):
    """The ssh_config or what it names cannot be used."""

    code = "ssh_config"
    http_status = 400


class HostKeyError(SshError):
    """The node cannot prove that it is the one it was."""

    code = "host_key"


class UnknownHostKeyError(HostKeyError):
    """Nobody has vouched for this key yet; `accept_host_key` takes ``key`` into ``file``."""

    code = "unknown_host_key"

    def __init__(
        self, message: str, *, key: HostKey, file: Path, hint: str = "", **details: Any
    ) -> None:
        super().__init__(message, hint=hint, fingerprint=key.fingerprint, **details)
        self.key = key
        self.file = file


class ChangedHostKeyError(HostKeyError):
    """Another key is known for this host: never accepted by a flag."""

    code = "changed_host_key"


class ConnectionLostError(SshError):
    """The connection went away; what ran on the node ends there by its lease."""

    code = "connection_lost"
    http_status = 503


class LoginShellError(SshError):
    """The login shell of the node did not let our program run."""

    code = "login_shell"


class RemotePythonError(SshError):
    """The node has no Python that is new enough."""

    code = "remote_python"


class RemoteProgramError(SshError):
    """The program is not on the node."""

    code = "remote_program"


class RemoteMachineError(SshError):
    """The node is not usable as it is: a full disk, a foreign run directory."""

    code = "remote_machine"


class NoHelloError(SshError):
    """A daemon was started and never said that it serves."""

    code = "no_hello"
    http_status = 503


class OutputTooLongError(SshError):
    """A remote program said more than its caller takes."""

    code = "output_too_long"


class TransferError(SshError):
    """A file could not be copied to or from the node."""

    code = "transfer"
