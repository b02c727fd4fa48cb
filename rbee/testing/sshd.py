"""The files of a throw-away sshd and of its clients: keys, configurations, known hosts."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import attrs

from rbee.errors import MachineError

PACKAGES = "apt-get install openssh-server iproute2"
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_PENALTIES_SINCE = (9, 8)  # the first sshd that locks out whoever fails to log in


@attrs.frozen
class Login:
    """Whom a host lets in, and with what around him."""

    user: str
    uid: int
    gid: int
    home: Path
    environment: Mapping[str, str]


@attrs.frozen
class Place:
    """Where a host's sshd listens, and where its files are."""

    name: str
    address: str
    port: int
    directory: Path

    @property
    def pid_file(self) -> Path:
        """The file that sshd writes once it listens."""
        return self.directory / "sshd.pid"

    @property
    def log(self) -> Path:
        return self.directory / "sshd.log"

    @property
    def host_key(self) -> Path:
        return self.directory / "host_key"

    @property
    def spelled(self) -> tuple[str, ...]:
        """The names of this host as a known_hosts file spells them."""
        names = (self.name, self.address)
        return names if self.port == 22 else tuple(f"[{name}]:{self.port}" for name in names)


def find_program(name: str) -> str:
    """Return the path of a program, also of one in an sbin that is not on PATH; "" for none."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}") or ""


def make_keys(paths: Iterable[Path]) -> None:
    """Make one unprotected ed25519 key pair per path, all at once."""
    made = [
        subprocess.Popen(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "rbee", "-f", path],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )
        for path in paths
    ]  # fmt: skip
    codes = [popen.wait() for popen in made]
    if any(codes):
        raise MachineError("ssh-keygen made no key", hint="ssh-keygen -t ed25519 -f /tmp/key")


def public_key(key: Path) -> str:
    """Return kind and key of the pair's public half, without its comment."""
    return " ".join(key.with_name(key.name + ".pub").read_text().split()[:2])


def write_sshd_config(place: Place, login: Login, client_key: str) -> Path:
    """Write what sshd reads; it has nothing of the machine's own configuration."""
    authorized = place.directory / "authorized_keys"
    authorized.write_text(client_key + "\n")
    config = place.directory / "sshd_config"
    lines = [
        f"ListenAddress {place.address}",
        f"Port {place.port}",
        f"HostKey {place.host_key}",
        f"PidFile {place.pid_file}",
        f"AuthorizedKeysFile {authorized}",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "PermitRootLogin prohibit-password",
        "UseDNS no",
        "PrintMotd no",
        "PrintLastLog no",
        "MaxStartups 100",
        "MaxSessions 100",
        "LogLevel VERBOSE",
        "Subsystem sftp internal-sftp",
        *_set_environment(login.environment),
        *_no_penalties(),
    ]
    config.write_text("\n".join(lines) + "\n")
    return config


def _set_environment(environment: Mapping[str, str]) -> list[str]:
    if not environment:
        return []
    # All in one line: of several, sshd takes the first only.
    return ["SetEnv " + " ".join(f'"{name}={value}"' for name, value in environment.items())]


def _no_penalties() -> list[str]:
    answer = subprocess.run(["ssh", "-V"], stderr=subprocess.PIPE, text=True, check=False).stderr
    found = re.match(r"OpenSSH_(\d+)\.(\d+)", answer)
    new = found is not None and (int(found[1]), int(found[2])) >= _PENALTIES_SINCE
    return ["PerSourcePenalties no"] if new else []


def known_hosts(place: Place) -> str:
    """Return the host's line for a known_hosts file."""
    return f"{','.join(place.spelled)} {public_key(place.host_key)}\n"


def hashed_known_hosts(place: Place) -> str:
    """Return the same as `known_hosts` as ssh writes it with ``HashKnownHosts yes``."""
    key = public_key(place.host_key)
    return "".join(f"{_hashed(name)} {key}\n" for name in place.spelled)


def _hashed(name: str) -> str:
    salt = secrets.token_bytes(20)
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


def ssh_config(places: Iterable[Place], *, user: str, key: Path, known: Path) -> str:
    """Return a client's configuration that knows every host by its name, and asks nothing."""
    hosts = "".join(
        f"Host {place.name}\n  HostName {place.address}\n  Port {place.port}\n" for place in places
    )
    return hosts + (
        f"Host *\n  User {user}\n  IdentityFile {key}\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {known}\n  GlobalKnownHostsFile /dev/null\n"
        "  StrictHostKeyChecking yes\n  UpdateHostKeys no\n  BatchMode yes\n"
    )
