"""The first process of a throw-away host: it moves apart, keeps sshd, and reaps what is orphaned.

It is a child subreaper, so everything that a session leaves behind stays below it.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import time
from pathlib import Path

import attrs

from rbee import guard
from rbee.errors import MachineError
from rbee.testing import namespaces
from rbee.testing.sshd import Login, Place, find_program

START_LIMIT = 10.0
START_SSHD = signal.SIGUSR1
APART, UP, FAILED = b"apart", b"up", b"failed "
_OWN_FILES = ("passwd", "shadow", "group", "hosts")


@attrs.frozen
class Isolation:
    """What a host of its own kernel namespaces sees of the machine.

    Attributes:
        etc: a directory with files to see instead of the machine's.
        way: what every user of the host must be able to read.
    """

    etc: Path
    way: tuple[Path, ...]


def write_users(etc: Path, login: Login) -> None:
    """Write user files as the machine's, with one more user; the machine's own stay as they are."""
    user, uid, gid = login.user, login.uid, login.gid
    first = {
        "passwd": f"{user}:x:{uid}:{gid}::{login.home}:{_shell()}",
        # Not "!": sshd lets nobody in whose account is locked.
        "shadow": f"{user}:*:19000:0:99999:7:::",
        "group": f"{user}:x:{gid}:",
    }
    for name, line in first.items():
        target, machines = etc / name, Path("/etc") / name
        target.touch(mode=0o600 if name == "shadow" else 0o644)
        target.write_text(f"{line}\n{machines.read_text() if machines.exists() else ''}")


def _shell() -> str:
    return next((shell for shell in ("/bin/bash", "/bin/sh") if Path(shell).exists()), "")


def free_uid(first: int = 50000, last: int = 59999) -> int:
    """Return a number that no user of this machine has."""
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return secrets.choice([uid for uid in range(first, last) if uid not in taken])


def run(
    place: Place, config: Path, channel: socket.socket, isolation: Isolation | None, parent: int
) -> None:
    """Be the host until killed. Says `APART`, reads lines for ``ip``, says `UP`."""
    guard.die_with_parent(signal.SIGKILL, parent)
    guard.become_subreaper()
    guard.set_title(f"rbee-host {place.name}")
    _close_standard_streams()
    if isolation is not None:
        _move_apart(place.name, isolation)
    channel.send(APART)
    if lines := channel.recv(1 << 16).decode().strip():
        namespaces.batch("ip", lines.splitlines())
    _keep_sshd(place, config, channel)


def _close_standard_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    os.close(null)


def _move_apart(name: str, isolation: Isolation) -> None:
    namespaces.unshare(namespaces.NEWNET | namespaces.NEWNS | namespaces.NEWUTS)
    namespaces.keep_mounts_private()
    socket.sethostname(name)
    for file in _OWN_FILES:
        namespaces.bind(isolation.etc / file, Path("/etc") / file)
    namespaces.open_way(isolation.way)
    namespaces.mount("tmpfs", Path("/run"), "tmpfs", options="mode=755")
    Path("/run/sshd").mkdir(mode=0o755)  # sshd's own condition for starting as root


def _keep_sshd(place: Place, config: Path, channel: socket.socket) -> None:
    numbers = {signal.SIGCHLD, START_SSHD}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    listener = _start_sshd(place, config)
    _wait_listening(place, listener)
    channel.send(UP)
    while True:
        number = signal.sigwait(numbers)
        if listener in _reap():
            listener = 0
            place.pid_file.unlink(missing_ok=True)  # a killed sshd leaves it
        if number == START_SSHD and not listener:
            listener = _start_sshd(place, config)


def _start_sshd(place: Place, config: Path) -> int:
    argv = [find_program("sshd"), "-D", "-f", str(config), "-E", str(place.log)]
    parent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        guard.die_with_parent(signal.SIGKILL, parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execv(argv[0], argv)
    finally:
        os._exit(127)


def _reap() -> set[int]:
    ended: set[int] = set()
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not pid:
            return ended
        ended.add(pid)


def _wait_listening(place: Place, listener: int) -> None:
    until = time.monotonic() + START_LIMIT
    while not read_pid(place):
        ended, _ = os.waitpid(listener, os.WNOHANG)
        if ended or time.monotonic() > until:
            log = place.log.read_text()[-500:].strip() if place.log.exists() else "it says nothing"
            raise MachineError(f"sshd of {place.name} does not start: {log}")
        time.sleep(0.002)


def read_pid(place: Place) -> int:
    """Return the process id of a host's sshd if it listens, else 0."""
    try:
        return int(place.pid_file.read_text())
    except (OSError, ValueError):
        return 0


def make_home(login: Login) -> None:
    """Make the user's home, his own."""
    login.home.mkdir()
    if os.geteuid() == 0:
        shutil.chown(login.home, login.uid, login.gid)
