"""A model of this machine brought into a node's catalog, over SSH; it needs no hub and no hive.

What has come stays on the node as an unfinished download, so that the next try goes on with it.
It becomes a model there once its hashes were checked, whole or not at all.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import attrs

from rbee.errors import ConflictError, InsufficientError, RbeeError
from rbee.models.child import Narrate
from rbee.models.parcel import Parcel
from rbee.models.progress import Meter
from rbee.nodes import receive
from rbee.ssh import (
    Completed,
    Connection,
    RemoteMachineError,
    SshError,
    TransferError,
    Wish,
    open_remote,
    run,
)
from rbee.units import human
from rbee.wire import codec

TRIES = 2  # what came wrong, through whatever is in between, is sent once more
GRACE = 2.0
LAST_WORDS = 400
SAYS = 1 << 20


@attrs.frozen
class Delivered:
    """Where the model is on the node; ``sent``: the bytes that went there, 0 if it had them."""

    directory: str
    sent: int


async def deliver(
    parcel: Parcel, connection: Connection, narrate: Narrate, *, home: str = ""
) -> Delivered:
    """Have a sealed parcel in a node's catalog.

    Args:
        home: its ``RBEE_HOME``; "" takes what the node's environment says, then ``~/.rbee``.

    Raises:
        ConflictError: a worker there has another version of it, or somebody fetches it there.
        InsufficientError: its disk is too full.
        SshError: the connection is lost, or the node cannot take it; what came stays.
    """
    sent = 0
    for _ in range(TRIES):
        async with _open_receiver(parcel, connection, home) as told:
            if told["state"] == "there":
                narrate("skip", f"{parcel.entry.reference}: node {connection.node} has it already")
                return Delivered(told["directory"], sent)
            async with _explaining(parcel, connection, home):
                sent += await _send(parcel, connection, told, narrate)
            narrate("check", f"{human(parcel.entry.size)} on {connection.node}")
            argv = _argv("finish", parcel, home)
            ended = _answer(connection, await run(connection, argv, grace=GRACE))
        if ended["state"] == "there":
            return Delivered(ended["directory"], sent)
        narrate("retry", f"{len(ended['wrong'])} files came wrong")
    raise TransferError(
        f"{parcel.entry.reference} did not come to node {connection.node} as it was sent",
        hint=f"{connection.target.command} df -h",
        node=connection.node,
    )


@asynccontextmanager
async def _open_receiver(
    parcel: Parcel, connection: Connection, home: str
) -> AsyncGenerator[dict[str, Any], None]:
    """Hold the model's lock on the node while the body runs; yield what is there."""
    wish = Wish(_argv("prepare", parcel, home), [GRACE], connection.lease, bare=True)
    async with open_remote(connection, wish, limit=SAYS) as process:
        said = b""
        while b"\n" not in said and (more := await process.read()):
            said += more
        status = 0 if b"\n" in said else await process.wait()
        done = Completed(status, said, process.channel.stderr)
        told = _answer(connection, done)
        _check(told, parcel, connection)
        yield told


@asynccontextmanager
async def _explaining(
    parcel: Parcel, connection: Connection, home: str
) -> AsyncGenerator[None, None]:
    """Say of a transfer that failed that the disk there has no room for the rest, if it is so.

    SFTP tells no more than "failure" of a full disk.
    """
    try:
        yield
    except TransferError:
        left = await run(connection, _argv("room", parcel, home), grace=GRACE)
        _check(_answer(connection, left), parcel, connection)
        raise


async def _send(
    parcel: Parcel, connection: Connection, told: dict[str, Any], narrate: Narrate
) -> int:
    """Send what the node lacks of each file; return how many bytes that were."""
    have: dict[str, int] = told["have"]
    meter, total = Meter(), parcel.entry.size
    done = began = sum(have.values())
    for part, file in parcel.parts().items():
        offset = have.get(part)
        if offset == file.size:
            continue
        before = done - (offset or 0)

        def tell(arrived: int, of: int, before: int = before) -> None:
            at = before + arrived
            narrate("send", meter.tell(at, total), share=at / (total or 1))

        source, target = parcel.directory / file.name, f"{told['partial']}/{part}"
        await connection.put_rest(source, target, offset or 0, progress=tell)
        done = before + file.size
    return done - began


def _argv(verb: str, parcel: Parcel, home: str) -> list[str]:
    record = codec.dumps(parcel.entry).decode() + "\n"
    # "": the node's own Python; nothing of this is read by a shell
    return ["", "-I", "-S", "-c", _source(), verb, home, parcel.name, record]


@cache
def _source() -> str:
    return inspect.getsource(receive)


def _answer(connection: Connection, done: Completed) -> dict[str, Any]:
    node = connection.node
    try:
        told: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        why = done.stderr.strip()[-LAST_WORDS:] or f"it ended with code {done.status}"
        raise SshError(
            f"node {node} cannot take the model: {why}",
            hint=f"rbee-keeper node check {node}",
            node=node,
        ) from None
    if told["state"] == "failed":
        raise RemoteMachineError(
            f"node {node} cannot be used as it is: {told['why']}",
            hint=f"{connection.target.command} df -h",
            node=node,
        )
    if told["state"] == "used":
        raise _in_use(node)
    return told


def _check(told: dict[str, Any], parcel: Parcel, connection: Connection) -> None:
    what, node = parcel.entry.reference, connection.node
    if told["state"] == "busy":
        raise ConflictError(
            f"{what} is being fetched by another rbee on node {node}",
            code="model_busy",
            hint=f"rbee-keeper ps   # or on {node}",
        )
    if told["state"] == "full":
        raise _full(told, what, node)


def _in_use(node: str) -> RbeeError:
    return ConflictError(
        f"a worker on node {node} has another version of this model loaded; it stays as it is",
        code="model_in_use",
        hint="rbee-keeper worker list   # then rbee-keeper worker stop WORKER",
    )


def _full(told: dict[str, Any], what: str, node: str) -> RbeeError:
    required, available = told["needed"], told["free"]
    return InsufficientError(
        f"not enough disk for {what} on node {node}: needed {human(required)}, "
        f"free {human(available)} at {told['models']}",
        code="insufficient_disk",
        hint=f"rbee-keeper model list --node {node}   # then rbee-keeper model rm MODEL "
        f"--node {node}",
        required=required,
        available=available,
    )
