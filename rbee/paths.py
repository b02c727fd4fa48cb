"""Paths as people type them."""

from __future__ import annotations

from pathlib import Path

from rbee.errors import UsageError


def full_path(text: str | Path) -> Path:
    """Return what a shell's user means by a path: one from the directory he is in.

    Raises:
        UsageError: it begins with the ``~`` of a user who is not there.
    """
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as exc:
        user = Path(text).parts[0].removeprefix("~")
        raise UsageError(
            f"there is no home directory of {user or 'yours'} on this machine, which {str(text)!r} "
            "begins with",
            hint=f"getent passwd {user}".rstrip(),
        ) from exc
