"""Host keys that a user vouches for."""

from __future__ import annotations

import os
from pathlib import Path

import attrs

from rbee.home import writing

KINDS = ("ed25519", "ecdsa", "rsa")


@attrs.frozen
class HostKey:
    """A host's public key as it was offered.

    Attributes:
        host: the name in the known_hosts file: ``host`` or ``[host]:port``.
        public: ``ssh-ed25519 AAAA…``.
        fingerprint: ``SHA256:…``, what a user compares.
    """

    host: str
    public: str
    fingerprint: str

    @property
    def line(self) -> str:
        return f"{self.host} {self.public}"

    @property
    def usual_file(self) -> str:
        """Where OpenSSH has it on the host, for who wants to compare."""
        kind = next((kind for kind in KINDS if kind in self.public.split()[0]), "*")
        return f"/etc/ssh/ssh_host_{kind}_key.pub"


def known_name(host: str, port: int) -> str:
    """Return how known_hosts files call a host."""
    return host if port == 22 else f"[{host}]:{port}"


def accept_host_key(known_hosts: Path, key: HostKey) -> None:
    """Append a key to a known_hosts file, which is made if it is missing.

    Raises:
        MachineError: the file cannot be written.
    """
    with writing(known_hosts.parent):
        known_hosts.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(known_hosts, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(fd, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            begin = b"" if file.read(1) in (b"", b"\n") else b"\n"  # an unended last line
            file.write(begin + key.line.encode() + b"\n")  # one write: nobody sees a half line
