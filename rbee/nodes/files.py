"""The files of this machine that a node's entry names: its private key, its host in ssh_config."""

from __future__ import annotations

import itertools
import re
import shlex
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from rbee.errors import BadInputError, MachineError, NotFoundError
from rbee.nodes.node import Node

SSH_CONFIG = "~/.ssh/config"
DEEPEST = 16  # includes in includes, as ssh itself allows
_LINE = re.compile(r"\s*(host|match|include)(?:\s*=\s*|\s+)(.*)", re.IGNORECASE)


def check_files(node: Node, ssh_config: Path | None = None) -> None:
    """Check what a node's entry names on this machine.

    Raises:
        NotFoundError: the key file or the alias is not there.
        BadInputError: the key file is not one, or others can read it.
        MachineError: a file cannot be read.
    """
    if node.key:
        check_key(Path(node.key))
    if node.ssh_alias:
        check_alias(node.ssh_alias, ssh_config or Path(SSH_CONFIG).expanduser())


def check_key(path: Path) -> None:
    """Check a private key's file; its contents stay unread but for one line."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(
            f"there is no key file {path}", code="unknown_key", hint="ls -l ~/.ssh"
        ) from None
    except OSError as exc:
        raise _unreadable("key file", path, exc) from exc
    if not stat.S_ISREG(found.st_mode):
        raise BadInputError(
            f"key file {path} is not a file", hint=f"ls -ld {shlex.quote(str(path))}"
        )
    if found.st_mode & 0o077:
        raise BadInputError(
            f"key file {path} can be read by others (mode {stat.S_IMODE(found.st_mode):04o}; "
            "needed: 0600)",
            code="key_not_private",
            hint=f"chmod 600 {shlex.quote(str(path))}",
        )
    _check_private_key(path)


def _check_private_key(path: Path) -> None:
    try:
        with path.open("rb") as file:
            first = file.readline(100)
    except OSError as exc:
        raise _unreadable("key file", path, exc) from exc
    if first.startswith((b"ssh-", b"ecdsa-", b"sk-")):
        raise BadInputError(
            f"{path} is a public key; the private one is needed",
            hint=f"ls -l {shlex.quote(str(path.with_suffix('')))}",
        )


def _unreadable(what: str, path: Path, exc: OSError) -> MachineError:
    return MachineError(
        f"cannot read the {what} {path}: {exc.strerror}", hint=f"ls -l {shlex.quote(str(path))}"
    )


def check_alias(alias: str, config: Path) -> None:
    """Check that ssh_config has a host of that name; ``Host *`` alone makes none.

    A block that holds only under a condition counts as there.
    """
    blocks = list(_blocks(config, DEEPEST))
    if any(_matches(alias, patterns) for patterns in blocks):
        return
    import difflib

    names = {name for patterns in blocks for name in patterns if not set(name) & set("*?!")}
    close = difflib.get_close_matches(alias, sorted(names), n=1)
    there = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(sorted(names))}"
    raise NotFoundError(
        f"{config} has no host {alias!r}; " + (there if names else "it names none"),
        code="unknown_alias",
        hint=f"grep -i '^ *host' {shlex.quote(str(config))}",
    )


def _matches(alias: str, patterns: list[str]) -> bool:
    refused = [name[1:] for name in patterns if name.startswith("!")]
    meant = [name for name in patterns if not name.startswith("!") and name.strip("*")]
    return any(_is_like(alias, name) for name in meant) and not any(
        _is_like(alias, name) for name in refused
    )


def _is_like(alias: str, pattern: str) -> bool:
    return fnmatchcase(alias.lower(), pattern.lower().replace("[", "[[]"))


def _blocks(config: Path, depth: int) -> Iterator[list[str]]:
    """Yield the patterns of each ``Host`` and ``Match host`` line, in included files as well."""
    for keyword, words in _lines(config):
        if keyword == "host":
            yield words
        elif keyword == "match":
            yield from _match_patterns(words)
        elif depth:
            for path in (path for word in words for path in _included(config, word)):
                yield from _blocks(path, depth - 1)


def _match_patterns(words: list[str]) -> Iterator[list[str]]:
    for criterion, pattern in itertools.pairwise(words):
        if criterion.lower() in ("host", "originalhost"):
            yield pattern.split(",")


def _included(config: Path, word: str) -> list[Path]:
    """Return the files that an ``Include`` names; relative ones lie in ``~/.ssh``."""
    try:
        path = Path("~/.ssh").expanduser() / Path(word).expanduser()
        below = path.relative_to(path.anchor)
        return sorted(found for found in Path(path.anchor).glob(str(below)) if found.is_file())
    # The ~ of nobody, a pattern that is none, and the root; the SSH client falls over them as well.
    except (RuntimeError, ValueError, IndexError, OSError) as exc:
        raise BadInputError(
            f"{config} cannot be used: Include {word}: {exc}",
            code="bad_ssh_config",
            hint=f"grep -in include {shlex.quote(str(config))}",
        ) from exc


def _lines(config: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        text = config.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return
    except OSError as exc:
        raise _unreadable("SSH configuration", config, exc) from exc
    for line in text.splitlines():
        if match := _LINE.fullmatch(line):
            yield match[1].lower(), _words(match[2])


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:  # a quote that is not closed: ssh itself refuses the file
        return []
