"""Who listens on a port, as far as this user may see."""

from __future__ import annotations

from pathlib import Path

TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
LISTEN = "0A"


def find_holder(port: int) -> str:
    """Return `` by pid 123 (nginx)``; "" where that cannot be read, as of another user's."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(fd.readlink()) in sockets:
                process = fd.parents[1]
                return f" by pid {process.name} ({(process / 'comm').read_text().strip()})"
        except OSError:  # it has gone, or is not ours to look into
            continue
    return ""


def _inodes(port: int) -> set[str]:
    tables = [path.read_text() for path in map(Path, TABLES) if path.exists()]
    lines = [line.split() for table in tables for line in table.splitlines()]
    return {line[9] for line in lines if line[3] == LISTEN and line[1].endswith(f":{port:04X}")}
