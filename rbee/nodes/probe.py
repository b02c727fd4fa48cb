"""Trying a node: log in, have `rbee-hive detect` run there, and believe what makes sense."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import attrs
import trio

from rbee import __version__
from rbee.aio import Aio
from rbee.errors import BadInputError, InsufficientError
from rbee.nodes.add import NoRbeeError, Probe
from rbee.nodes.node import Node
from rbee.nodes.target import target_of
from rbee.ssh import (
    Completed,
    Connection,
    ConnectionLostError,
    HostKey,
    RemoteProgramError,
    SshError,
    SshTarget,
    UnknownHostKeyError,
    accept_host_key,
    open_connection,
    run,
)
from rbee.units import human
from rbee.wire import codec

DETECT = 60.0  # seconds; a driver that hangs makes it wait for ever
LEAST_DISK = 64 << 20  # bytes for a hive's log and sockets
TAIL = 300

Narrate = Callable[[str, str], None]
"""Told an action and what about it."""

Vouch = Callable[[UnknownHostKeyError], Awaitable[bool]]
"""Say whether a host key is the right one."""


async def probe_node(node: Node, aio: Aio, narrate: Narrate) -> dict[str, Any]:
    """Log in to a node and return what it has.

    Raises:
        NoRbeeError: the rbee there is missing, broken or another version.
        InsufficientError: its disk is full.
        RbeeError: it is not reached, does not let us in, or cannot run it, in words.
    """
    target = _target(node)
    narrate("connect", f"to {node.name} ({node.address})")
    try:
        async with open_connection(target, aio) as connection:
            narrate("detect", f"what {node.name} has")
            found = await detect(node, connection)
    except ConnectionLostError as exc:
        exc.hint = f"{target.command} -v true"  # `node check` is for registered nodes
        raise
    check_disk(node.name, found, target.command)
    return found


def _target(node: Node) -> SshTarget:
    try:
        return target_of(node)
    except BadInputError as exc:
        exc.hint = exc.hint.replace("node update", "node add")  # it is not registered yet
        raise


# host keys ----------------------------------------------------------------------------------------
def vouched(probe: Probe, vouch: Vouch) -> Probe:
    """Return a probe that asks ``vouch`` about each unknown host key, and goes on if it says yes.

    A key that is not the known one is never asked about.
    """

    async def probe_vouched(node: Node) -> dict[str, Any]:
        accepted: set[HostKey] = set()  # one per hop; a file that keeps nothing is asked once
        while True:
            try:
                return await probe(node)
            except UnknownHostKeyError as exc:
                if exc.key in accepted or not await vouch(exc):
                    raise
                accept_host_key(exc.file, exc.key)
                accepted.add(exc.key)

    return probe_vouched


# what it has --------------------------------------------------------------------------------------
@attrs.frozen
class Detected:
    """What rbee reads of `rbee-hive detect`; there is more."""

    rbee: str
    python: str
    disk_free: int
    devices: list[dict[str, Any]]
    engines: dict[str, str | None]


async def detect(node: Node, connection: Connection) -> dict[str, Any]:
    """Run `rbee-hive detect` on a node, with its environment, and return what that says.

    Raises:
        NoRbeeError: the rbee there is missing, broken or another version.
        SshError: it fails for another reason, or the connection does.
    """
    try:
        with trio.move_on_after(DETECT):
            argv = [f"{node.rbee_path}/rbee-hive", "detect"]
            return _read(node, connection, await run(connection, argv, env=node.environment))
    except RemoteProgramError as exc:
        raise _no_rbee(node, exc.message, code=NoRbeeError.code) from exc
    raise SshError(
        f"node {node.name}: rbee-hive detect has not ended after {DETECT:g} s",
        hint=_by_hand(node, connection),
        node=node.name,
    )


def _read(node: Node, connection: Connection, done: Completed) -> dict[str, Any]:
    if done.status:
        raise _failed(node, connection, done)
    try:
        found = json.loads(done.stdout)
        version = found["rbee"]
    except (ValueError, RecursionError, TypeError, KeyError) as exc:
        raise _no_rbee(node, f"{_what(node)} said {_shown(done.stdout)}, not what it has") from exc
    if version != __version__:
        raise _no_rbee(
            node,
            f"node {node.name} has rbee {str(version)[:40]} in {node.rbee_path}, needed is "
            f"{__version__}, as here",
            code="other_version",
        )
    return _checked(node, found)


def _checked(node: Node, found: dict[str, Any]) -> dict[str, Any]:
    names = attrs.fields_dict(Detected)
    try:
        codec.structure({name: found[name] for name in names if name in found}, Detected)
    except BadInputError as exc:
        raise _no_rbee(
            node, f"{_what(node)} said what we do not understand: {exc.message}"
        ) from exc
    return found


def _failed(node: Node, connection: Connection, done: Completed) -> SshError | NoRbeeError:
    lines = done.stderr.strip().splitlines() or ["(no word)"]
    if "Traceback" in done.stderr:  # a package or the interpreter is missing
        return _no_rbee(node, f"{_what(node)} is broken: {lines[-1][-TAIL:]}")
    told = next((line for line in lines if line.startswith("error: ")), lines[-1])
    return SshError(
        f"{_what(node)} failed with code {done.status}: {told.removeprefix('error: ')[-TAIL:]}",
        hint=_by_hand(node, connection),
        node=node.name,
    )


def _what(node: Node) -> str:
    return f"{node.rbee_path}/rbee-hive on node {node.name}"


def _shown(said: bytes) -> str:
    return repr(said[:80].decode("utf-8", "replace")) if said.strip() else "nothing"


def _no_rbee(node: Node, message: str, code: str = "broken_rbee") -> NoRbeeError:
    hint = f"rbee-keeper node install {node.name}"
    return NoRbeeError(message, hint=hint, code=code, node=node.name)


def _by_hand(node: Node, connection: Connection) -> str:
    return connection.target.running(f"{node.rbee_path}/rbee-hive", "detect")


def check_disk(name: str, found: Mapping[str, Any], way: str = "") -> str:
    """Return what is free where a node's ``RBEE_HOME`` is, in words; ``way`` is for the hint.

    Raises:
        InsufficientError: not even a hive's log would fit.
    """
    free = int(found["disk_free"])
    if free < LEAST_DISK:
        raise InsufficientError(
            f"node {name} has {human(free)} of disk left where its RBEE_HOME is, a hive needs "
            f"{human(LEAST_DISK)}",
            hint=f"{way} df -h".strip(),
            required=LEAST_DISK,
            available=free,
            node=name,
        )
    return f"{human(free)} free"
