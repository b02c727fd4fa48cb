"""One registered node as a frozen value: its name, how it is reached, how it was last seen.

What is checked here needs no disk and no network; that the files exist which a node names is
`rbee.nodes.files`' to say.
"""

from __future__ import annotations

import enum
import ipaddress
import re
import shlex
from collections.abc import Mapping
from typing import Any

import attrs

from rbee.errors import BadInputError, ConflictError
from rbee.model import LOCALHOST, NodeName, node_name
from rbee.wire.messages import AddNode, NodeInfo, UpdateNode

RBEE_PATH = "~/.rbee/venv/bin"
SSH_PORT = 22
HIDDEN = "***"
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")
_ALIAS = re.compile(r"[^\s\"'*?!,#=-][^\s\"'*?!,#]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)KEY$", re.IGNORECASE)
_ADD, _UPDATE = "rbee-keeper node add", "rbee-keeper node update"
_OURS = ("RBEE_NONCE", "SPT_NOENV")


class Transport(enum.Enum):
    """How the queen talks to hive and workers of a node."""

    DIRECT = "direct"  # http://node-host:port, with the token
    SSH = "ssh"  # forwards: no open port there


class NodeStatus(enum.Enum):
    UNKNOWN = "unknown"  # not tried since it was changed
    READY = "ready"
    UNREACHABLE = "unreachable"
    UNUSABLE = "unusable"  # reached, but it cannot run a hive: rbee is missing, say


def _field(check: Any, default: Any) -> Any:
    return attrs.field(default=default, validator=_validator(check))


def _validator(check: Any) -> Any:
    def validate(node: Any, field: Any, value: Any) -> None:
        try:
            check(value)
        except BadInputError as exc:
            exc.hint = _command(node.name, exc.hint)
            raise

    return validate


def _command(name: str, flags: str) -> str:
    """Make a hint of flags one that runs; what is no flag runs as it is."""
    return f"{_ADD} {shlex.quote(name)} {flags}" if flags.startswith("--") else flags


def _check_text(value: str, flag: str, what: str, most: int = 1024) -> None:
    if not value.isprintable() or len(value) > most:
        raise BadInputError(
            f"{what} {value[:80]!r} is not valid: at most {most} characters, all printable",
            hint=f"{flag} ''",
        )


def _check_host(value: str) -> None:
    if value and not (_is_address(value) or (_HOST.fullmatch(value) and len(value) <= 253)):
        user, at, host = value.rpartition("@")
        raise BadInputError(
            f"host {value[:80]!r} is neither a host name nor an IP address",
            hint=shlex.join(["--user", user, "--host", host]) if at else "--host 192.0.2.7",
        )


def _is_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return value.isprintable() and " " not in value


def _check_port(value: int | None) -> None:
    if value is not None and not 1 <= value <= 65535:
        raise BadInputError(f"port {value} is not between 1 and 65535", hint="--port 22")


def _check_user(value: str) -> None:
    _check_text(value, "--user", "user", 256)


def _check_key(value: str) -> None:
    _check_text(value, "--key", "key file", 4096)
    if value and not value.startswith("/"):
        raise BadInputError(
            f"key file {value!r} is a relative path: a full one is needed, or one from ~/",
            hint="--key ~/.ssh/id_ed25519",
        )


def _check_alias(value: str) -> None:
    if value and not (_ALIAS.fullmatch(value) and value.isprintable() and len(value) <= 255):
        raise BadInputError(
            f"{value[:80]!r} cannot be an alias in ~/.ssh/config: one word, no pattern",
            hint="grep -i '^ *host' ~/.ssh/config",
        )


def _check_rbee_path(value: str) -> None:
    _check_text(value, "--rbee-path", "rbee path", 4096)
    if not value.startswith(("/", "~/")):
        raise BadInputError(
            f"rbee path {value!r} is relative: the directory of rbee-hive on the node is needed, "
            "from / or ~/",
            hint=f"--rbee-path {RBEE_PATH}",
        )


def _check_environment(values: Mapping[str, str]) -> None:
    for name, value in values.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise BadInputError(
                f"{name[:80]!r} cannot be an environment variable (needed: NAME=VALUE)",
                hint="--env OMP_NUM_THREADS=8",
            )
        if name in _OURS:
            raise BadInputError(
                f"environment variable {name} is rbee's own to set",
                hint="--env OMP_NUM_THREADS=8",
            )
        if name.startswith("HF_") or name == "HUGGING_FACE_HUB_TOKEN":
            raise BadInputError(
                f"environment variable {name} is never stored: each request hands yours over",
                hint=f"export {name}   # where rbee-keeper runs",
            )


@attrs.frozen
class Node:
    """A machine that can be reached over SSH.

    Attributes:
        host: name or address; "" is the node's name.
        port: None is 22.
        user: "" is who runs the queen.
        key: absolute path of a private key; "" leaves it to agent and default keys.
        ssh_alias: a host of ``~/.ssh/config``, which then says host, port, user and key.
        rbee_path: the directory of `rbee-hive` on the node.
        environment: set there for the hive and all below it.
        last_seen, created: seconds since the epoch; 0 is never.
        last_error: why it is not ready; "" if it is, or was never tried.
        capabilities: what `rbee-hive detect` printed there.

    Raises:
        BadInputError: a field is wrong; `ConflictError`: ``localhost``, which is always there.
    """

    name: NodeName
    host: str = _field(_check_host, "")
    port: int | None = _field(_check_port, None)
    user: str = _field(_check_user, "")
    key: str = _field(_check_key, "")
    ssh_alias: str = _field(_check_alias, "")
    rbee_path: str = _field(_check_rbee_path, RBEE_PATH)
    environment: dict[str, str] = attrs.field(
        factory=dict, validator=_validator(_check_environment)
    )
    transport: Transport = Transport.DIRECT
    status: NodeStatus = NodeStatus.UNKNOWN
    last_seen: float = 0.0
    last_error: str = ""
    capabilities: dict[str, Any] = attrs.field(factory=dict)
    created: float = 0.0

    def __attrs_post_init__(self) -> None:
        node_name(self.name)
        refuse_localhost(self.name)
        said = [name for name in ("host", "port", "user", "key") if getattr(self, name)]
        if self.ssh_alias and said:
            cleared = " ".join(f'--{name} ""' for name in said)
            raise BadInputError(
                f"node {self.name}: alias {self.ssh_alias!r} of ~/.ssh/config says host, port, "
                f"user and key; it excludes --{', --'.join(said)}",
                hint=f"{_ADD} {self.name} --from-ssh-config {shlex.quote(self.ssh_alias)} "
                f"{cleared}",
            )

    @property
    def address(self) -> str:
        """Return where it is, for people; nothing connects by this text."""
        if self.ssh_alias:
            return f"{self.ssh_alias} (ssh config)"
        host = self.host or self.name
        user = f"{self.user}@" if self.user else ""
        if self.port in (None, SSH_PORT):
            return f"{user}{host}"
        return f"{user}[{host}]:{self.port}" if ":" in host else f"{user}{host}:{self.port}"


def refuse_localhost(name: str) -> None:
    """Raise `ConflictError` for ``localhost``: nothing about it is registered."""
    if name == LOCALHOST:
        raise ConflictError(
            f"{LOCALHOST} is this machine: it is always there, and cannot be added, changed or "
            "removed",
            code="reserved_node",
            hint="rbee-keeper node list",
        )


def new_node(body: AddNode) -> Node:
    """Make the node that somebody asks to add.

    Raises:
        BadInputError: a field is wrong.
        ConflictError: it is called ``localhost``.
    """
    return Node(
        name=node_name(body.name),
        host=body.host,
        port=body.port,
        user=body.user,
        key=_expanded(body.key),
        ssh_alias=body.ssh_alias,
        rbee_path=body.rbee_path or RBEE_PATH,
        environment={name: value for name, value in body.environment.items() if value},
        transport=_transport(body.name, body.transport),
    )


def changed(node: Node, update: UpdateNode) -> Node:
    """Return the node with what ``update`` gives; "" (and port 0) stands for the default.

    What was found out about the node is forgotten where it may not hold any more.
    """
    given = {
        field.name: getattr(update, field.name)
        for field in attrs.fields(UpdateNode)
        if getattr(update, field.name) is not None
    }
    try:
        changes = {name: _meant(node, name, value) for name, value in given.items()}
        after = attrs.evolve(node, **changes)
    except BadInputError as exc:
        exc.hint = exc.hint.replace(_ADD, _UPDATE)
        raise
    if after == node:
        return node
    if any(getattr(after, name) != getattr(node, name) for name in _REACHED_BY):
        after = attrs.evolve(after, capabilities={}, last_seen=0.0)
    return attrs.evolve(after, status=NodeStatus.UNKNOWN, last_error="")


_REACHED_BY = ("host", "port", "user", "key", "ssh_alias")


def _meant(node: Node, name: str, value: Any) -> Any:
    match name:
        case "port":
            return value or None
        case "key":
            return _expanded(value)
        case "rbee_path":
            return value or RBEE_PATH
        case "transport":
            return _transport(node.name, value)
        case "environment":
            return {name: text for name, text in (node.environment | value).items() if text}
    return value


def _transport(name: str, value: str) -> Transport:
    try:
        return Transport(value or Transport.DIRECT.value)
    except ValueError:
        raise BadInputError(
            f"transport {value!r} is unknown; there are direct and ssh",
            hint=_command(name, "--transport direct"),
        ) from None


def _expanded(path: str) -> str:
    """Return a path of this machine with its ``~/`` filled in."""
    from pathlib import Path

    return str(Path(path).expanduser()) if path.startswith("~/") else path


def told(node: Node) -> NodeInfo:
    """Say what others may know of a node: no value of a variable that is named like a secret."""
    environment = {
        name: HIDDEN if _SECRET.search(name) else value for name, value in node.environment.items()
    }
    return NodeInfo(
        **{
            **attrs.asdict(node, recurse=False),
            "environment": environment,
            "transport": node.transport.value,
            "status": node.status.value,
            "address": node.address,
        }
    )


def this_machine() -> NodeInfo:
    """Describe ``localhost``, which no registry holds."""
    return NodeInfo(LOCALHOST, status=NodeStatus.READY.value, address=LOCALHOST)
