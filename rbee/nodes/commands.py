"""The commands about a node's entry, whole, for errors to suggest."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rbee.errors import RbeeError
from rbee.wire.messages import AddNode

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)KEY$", re.IGNORECASE)


@contextmanager
def completing(command: Callable[[str], str]) -> Iterator[None]:
    """Have an error that suggests mere flags suggest the command with them."""
    try:
        yield
    except RbeeError as exc:
        if exc.hint.startswith("--"):
            exc.hint = command(exc.hint)
        raise


def update_command(name: str, flags: str) -> str:
    return f"rbee-keeper node update {shlex.quote(name)} {flags}"


def add_command(body: AddNode, flags: str) -> str:
    """Write the `node add` of ``body``, in which ``flags`` win; no value of a secret is shown."""
    said = {word for word in shlex.split(flags) if word.startswith("--")}
    given = [
        ("host", body.host), ("port", body.port), ("user", body.user), ("key", body.key),
        ("from-ssh-config", body.ssh_alias), ("transport", body.transport),
        ("rbee-path", body.rbee_path), *(("env", item) for item in body.environment.items()),
    ]  # fmt: skip
    kept = [_flag(name, value) for name, value in given if value and f"--{name}" not in said]
    words = ["rbee-keeper node add", shlex.quote(body.name), *filter(None, kept), flags]
    return " ".join(words)


def _flag(name: str, value: object) -> str:
    if not isinstance(value, tuple):
        return f"--{name} {shlex.quote(str(value))}"
    variable, text = value
    if not is_secret(variable):
        return f"--{name} {shlex.quote(f'{variable}={text}')}"
    # The shell that runs it has the secret, or none is set.
    return f'--{name} "{variable}=${variable}"' if variable.isidentifier() else ""


def is_secret(variable: str) -> bool:
    """Tell whether a variable is named as those are whose values nobody is to see."""
    return bool(_SECRET.search(variable))
