"""A real sshd on loopback, of the one who runs the tests, with keys and files of its own."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

from rbee.guard import descendants, start_time
from rbee.ssh import SshTarget

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@attrs.define(eq=False)
class Sshd:
    """One running sshd; it lets in our user with ``key``."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes]
    host: str = "127.0.0.1"

    @property
    def key(self) -> Path:
        return self.directory / "id"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    @property
    def config(self) -> Path:
        return self.directory / "ssh_config"

    def target(self, **given: object) -> SshTarget:
        base = SshTarget(
            node="mac", host=self.host, port=self.port, user=getpass.getuser(),
            keys=(self.key,), config=self.config, known_hosts=self.known_hosts, agent="",
        )  # fmt: skip
        return attrs.evolve(base, **given)

    def vouch(self) -> None:
        public = (self.directory / "host.pub").read_text()
        self.known_hosts.write_text(f"[{self.host}]:{self.port} {public}")

    def sessions(self) -> list[int]:
        return list(descendants({self.process.pid: start_time(self.process.pid)}))

    def kill_sessions(self) -> None:
        """End every sshd of a session, not the listener nor what runs in the sessions."""
        for pid in self.sessions():
            try:
                name = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue
            if name.startswith("sshd"):
                os.kill(pid, signal.SIGKILL)


def keygen(path: Path, passphrase: str = "", kind: str = "ed25519") -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(path)], check=True)


@contextmanager
def open_sshd(directory: Path, *settings: str, home: Path | None = None) -> Iterator[Sshd]:
    """Run an sshd while the body runs; ``settings`` are further lines of its configuration."""
    assert SSHD, "apt-get install openssh-server"
    directory.mkdir(parents=True, exist_ok=True)
    keygen(directory / "host")
    keygen(directory / "id")
    (directory / "authorized").write_bytes((directory / "id.pub").read_bytes())
    (directory / "ssh_config").write_text("")
    port = _free_port()
    (directory / "sshd_config").write_text(
        "\n".join(
            [
                *settings,
                f"Port {port}", "ListenAddress 127.0.0.1",
                f"HostKey {directory}/host", f"AuthorizedKeysFile {directory}/authorized",
                "PasswordAuthentication no", "KbdInteractiveAuthentication no",
                "StrictModes no", "UsePAM no", "PermitRootLogin yes", "PidFile none",
                "MaxStartups 100", "Subsystem sftp internal-sftp",
            ]
        )
    )  # fmt: skip
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (directory / "sshd.log").open("wb") as log:
        process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(directory / "sshd_config")], stderr=log
        )
    sshd = Sshd(directory, port, process)
    try:
        _wait_listening(port, process)
        sshd.vouch()
        yield sshd
    finally:
        for pid in sshd.sessions():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("sshd does not listen")
