"""How a node is reached: what the user said, the rest is his ssh_config's."""

from __future__ import annotations

import shlex
from pathlib import Path

import attrs

from rbee.errors import BadInputError

LEASE = 10.0
# An ssh_config may hand both to a shell (ProxyCommand, Match exec): the same are refused by ssh.
FORBIDDEN = frozenset("'`\"$\\;&<>|(){}")


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

    Raises:
        BadInputError: host or user have what SSH gives to no shell either.
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

    def __attrs_post_init__(self) -> None:
        _check(self.node, "host", self.host, FORBIDDEN | {" ", "*", "?", "!"})
        if self.user is not None:
            _check(self.node, "user", self.user, FORBIDDEN)

    @property
    def command(self) -> str:
        """The ssh command that goes the same way, for hints."""
        return shlex.join(self._words("ssh"))

    @property
    def interactive(self) -> str:
        """The same with a terminal there, for what asks for a password."""
        return shlex.join(self._words("ssh", "-t"))

    @property
    def sees_forwarding(self) -> str:
        """The command that shows whether its sshd forwards ports."""
        return f"{self.command} grep -rsi forwarding /etc/ssh   # AllowTcpForwarding must be yes"

    def running(self, program: str, *args: str) -> str:
        """The ssh command that runs a program there; ``~/`` is of that machine."""
        tilde = "~/" if program.startswith("~/") else ""  # quoted it would be a name
        words = [tilde + shlex.quote(program.removeprefix(tilde)), *map(shlex.quote, args)]
        return f"{self.command} {shlex.quote(' '.join(words))}"

    def _words(self, *program: str) -> list[str]:
        words = [*program]
        words += ["-F", str(self.config)] if self.config else []
        words += ["-p", str(self.port)] if self.port else []
        words += [word for key in self.keys for word in ("-i", str(key))]
        words.append(f"{self.user}@{self.host}" if self.user else self.host)
        return words


def _check(node: str, what: str, value: str, forbidden: frozenset[str]) -> None:
    wrong = {char for char in value if char in forbidden or not char.isprintable()}
    if not value or value.startswith("-") or wrong:
        why = (
            f"contains {' '.join(map(repr, sorted(wrong)))}"
            if wrong
            else "is empty or begins with -"
        )
        raise BadInputError(
            f"node {node}: the SSH {what} {value!r} {why}",
            hint=f"rbee-keeper node update {shlex.quote(node)} --{what} ''",
        )
