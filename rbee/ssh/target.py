"""How a node is reached: what the user said, the rest is his ssh_config's."""

from __future__ import annotations

import shlex
from pathlib import Path

import attrs

LEASE = 10.0


@attrs.frozen
class SshTarget:
    """One node as an SSH client sees it.

    Attributes:
        node: the name that errors give it.
        host: name, address or alias in the ssh_config.
        port, user: None leaves them to the ssh_config, then to SSH's defaults.
        keys: private key files; none given: those of the ssh_config, then the default ones.
        config: the ssh_config to read; None reads the user's own.
        known_hosts: the file with host keys; None reads what the ssh_config names.
        agent: path of the agent's socket; None takes the ssh_config's, then ``SSH_AUTH_SOCK``;
            "" uses no agent.
        connect_limit: seconds for each try: name, TCP, keys, login.
    """

    node: str
    host: str
    port: int | None = None
    user: str | None = None
    keys: tuple[Path, ...] = ()
    config: Path | None = None
    known_hosts: Path | None = None
    agent: str | None = None
    connect_limit: float = 10.0

    @property
    def command(self) -> str:
        """The ssh command that goes the same way, for hints."""
        words = ["ssh"]
        words += ["-F", str(self.config)] if self.config else []
        words += ["-p", str(self.port)] if self.port else []
        words += [word for key in self.keys for word in ("-i", str(key))]
        words.append(f"{self.user}@{self.host}" if self.user else self.host)
        return shlex.join(words)
