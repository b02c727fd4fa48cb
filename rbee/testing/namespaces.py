"""Namespaces of the kernel as machines: making them, joining them, seeing who is in them.

Nothing here is named below /run/netns: a namespace lives as long as a process in it, so the
kernel itself removes it, with its interfaces, when the last one is killed.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rbee.testing.sshd import PACKAGES, SBIN, find_program

NEWNS, NEWUTS, NEWNET = 0x00020000, 0x04000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PROGRAMS = ("ip", "tc", "nsenter", "setpriv", "unshare")

libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Move this thread into new namespaces."""
    _check(libc.unshare(flags), "unshare")


def join(fd: int, flags: int) -> None:
    """Move this thread into the namespace behind ``fd``."""
    _check(libc.setns(fd, flags), "setns")


@contextmanager
def entered(namespace: int) -> Iterator[None]:
    """Sit in the network namespace behind a descriptor while the body runs; one thread only."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        join(namespace, NEWNET)
        try:
            yield
        finally:
            join(own, NEWNET)
    finally:
        os.close(own)


def mount(source: str, target: Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    result = libc.mount(
        source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _check(result, f"mount {target}")


def keep_mounts_private() -> None:
    """Let no mount of this namespace be seen outside of it."""
    mount("none", Path("/"), flags=MS_REC | MS_PRIVATE)


def bind(source: Path, target: Path) -> None:
    mount(str(source), target, flags=MS_BIND | MS_REC)


def open_way(paths: Iterable[Path]) -> None:
    """Let every user of this mount namespace reach ``paths``, also behind somebody's 0700 home.

    Such a directory is covered by an empty one that has nothing in it but the paths.
    """
    walls: dict[Path, set[Path]] = {}
    for path in paths:
        for step in reversed((path, *path.parents)):
            if not step.stat().st_mode & 0o001:
                walls.setdefault(step, set()).add(path)
                break
    for wall, inside in walls.items():
        _replace(wall, sorted(inside - {wall}))


def _replace(wall: Path, inside: Sequence[Path]) -> None:
    held = {path: os.open(path, os.O_PATH) for path in inside}
    mount("tmpfs", wall, "tmpfs", options="mode=755")
    for path, fd in held.items():
        path.mkdir(parents=True, exist_ok=True)
        bind(Path(f"/proc/self/fd/{fd}"), path)
        os.close(fd)


def batch(program: str, lines: Iterable[str]) -> None:
    """Run many commands of ``ip`` or ``tc`` in one process, in this thread's namespace."""
    done = subprocess.run(
        [find_program(program), "-batch", "-"],
        input="\n".join(lines) + "\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise OSError(f"{program}: {done.stderr.strip()}")


def why_none() -> str:
    """Return why this process cannot make machines of namespaces; "" when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in PROGRAMS if not find_program(name)]:
        return f"{' and '.join(missing)} not found (to have them: {PACKAGES})"
    return _try_out()


def _try_out() -> str:
    """Make one of each in a process whose end removes them."""
    said = _try_apart(
        "ip link add br0 type bridge && ip link add v0 type veth peer name v1 && "
        "tc qdisc replace dev v0 root blackhole"
    )
    return f"this machine makes no network namespaces: {said}" if said is not None else ""


@functools.cache
def has_netem() -> bool:
    """Tell whether the kernel itself can delay and lose what is sent."""
    return _try_apart("tc qdisc add dev lo root netem delay 1ms") is None


def _try_apart(script: str) -> str | None:
    """Run a script in namespaces of its own; return what it said if it failed."""
    path = f"{os.environ.get('PATH', os.defpath)}:{SBIN}"
    done = subprocess.run(
        ["unshare", "-nmu", "sh", "-c", script],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stderr.strip() if done.returncode else None


def network_of(pid: int) -> int:
    """Return the number of a process's network namespace; 0 when it has gone."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return _network_of_threads(pid)


def _network_of_threads(pid: int) -> int:
    """Ask the other threads: a main thread that has ended no longer knows its namespace."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return 0
    for task in tasks:
        try:
            return Path(f"/proc/{pid}/task/{task}/ns/net").stat().st_ino
        except OSError:
            continue
    return 0


def members(network: int) -> list[int]:
    """List the processes in a network namespace, whatever else they did to get away."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in pids if network_of(pid) == network]
