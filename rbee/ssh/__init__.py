"""Nodes over SSH: connections, programs and owned daemons there, as scopes."""

from rbee.ssh.connection import Connection, open_connection
from rbee.ssh.daemon import RemoteDaemon, fetch_tail, open_remote_daemon
from rbee.ssh.errors import (
    ChangedHostKeyError,
    ConnectionLostError,
    HostKeyError,
    LoginShellError,
    NoHelloError,
    OutputTooLongError,
    RemoteMachineError,
    RemoteProgramError,
    RemotePythonError,
    SshAuthError,
    SshConfigError,
    SshError,
    SshKeyError,
    TransferError,
    UnknownHostKeyError,
    UnreachableError,
)
from rbee.ssh.fence import Fence
from rbee.ssh.host_keys import HostKey, accept_host_key
from rbee.ssh.remote import (
    Completed,
    OperatorsHive,
    RemoteProcess,
    Sight,
    Wish,
    look,
    open_remote,
    run,
)
from rbee.ssh.target import SshTarget

__all__ = [
    "ChangedHostKeyError",
    "Completed",
    "Connection",
    "ConnectionLostError",
    "Fence",
    "HostKey",
    "HostKeyError",
    "LoginShellError",
    "NoHelloError",
    "OperatorsHive",
    "OutputTooLongError",
    "RemoteDaemon",
    "RemoteMachineError",
    "RemoteProcess",
    "RemoteProgramError",
    "RemotePythonError",
    "Sight",
    "SshAuthError",
    "SshConfigError",
    "SshError",
    "SshKeyError",
    "SshTarget",
    "TransferError",
    "UnknownHostKeyError",
    "UnreachableError",
    "Wish",
    "accept_host_key",
    "fetch_tail",
    "look",
    "open_connection",
    "open_remote",
    "open_remote_daemon",
    "run",
]
