"""Checking a node step by step: the way there, what it needs to run a hive, the way for tokens."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import attrs
import trio

from rbee.aio import Aio
from rbee.errors import RbeeError
from rbee.model import DEFAULT_ENGINE, LOCALHOST
from rbee.nodes.add import NoRbeeError
from rbee.nodes.engines import import_engine, import_here, install_on
from rbee.nodes.node import Node, NodeStatus, Transport
from rbee.nodes.probe import check_disk, detect
from rbee.nodes.store import lacks_engine
from rbee.nodes.target import target_of
from rbee.nodes.way import open_way
from rbee.ssh import (
    Connection,
    ConnectionLostError,
    RemotePythonError,
    SshKeyError,
    look,
    open_connection,
)
from rbee.units import human

TryImport = Callable[[], Awaitable[str]]
"""Import the engine where it is to run; return why that fails, "" if it does not."""

LOGIN = ("reachable", "auth")
STEPS = (
    *LOGIN, "exec", "python", "port", "latency", "rbee", "engine", "disk", "memory", "gpu",
)  # fmt: skip
RUNS = "the login shell runs what we send"


class Outcome(enum.Enum):
    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"  # it is not needed here, or another failed which it needs


@attrs.frozen
class Step:
    """One step that is over: what was found, or why it failed."""

    name: str
    outcome: Outcome
    text: str = ""
    seconds: float | None = None


@attrs.define(eq=False)
class Checkup:
    """One check: its steps are told as they begin and end, always in the order of `STEPS`.

    Attributes:
        status: what the node is after it.
        error: of the first step that failed; None: the node can be used.
        found: what `rbee-hive detect` said there; None if it did not come to that.
    """

    _begin: Callable[[str], None]
    _tell: Callable[[Step], None]
    steps: list[Step] = attrs.field(factory=list)
    status: NodeStatus = NodeStatus.READY
    error: RbeeError | None = None
    found: dict[str, Any] | None = None
    _began: float = 0.0

    @property
    def at(self) -> str:
        """The step that is not over yet; "" after the last."""
        return STEPS[len(self.steps)] if len(self.steps) < len(STEPS) else ""

    def begin(self, name: str) -> None:
        """Begin a step; those before it that were not made are skipped."""
        self._skip_to(STEPS.index(name))
        self._began = trio.current_time()
        self._begin(name)

    def succeed(self, text: str) -> None:
        self._add(Step(self.at, Outcome.OK, text, self._seconds()))

    def fail(self, error: RbeeError) -> None:
        if self.error is None:
            self.error = error
            self.status = NodeStatus.UNREACHABLE if self.at in LOGIN else NodeStatus.UNUSABLE
        self._add(Step(self.at, Outcome.FAILED, str(error), self._seconds()))

    def _seconds(self) -> float:
        return round(trio.current_time() - self._began, 4)

    def end(self) -> None:
        self._skip_to(len(STEPS))

    def _skip_to(self, index: int) -> None:
        for name in STEPS[len(self.steps) : index]:
            self._add(Step(name, Outcome.SKIPPED))

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        self._tell(step)

    async def attempt(self, name: str, check: Callable[[], Awaitable[str]]) -> None:
        """Make a step on which no other depends, unless the connection is lost."""
        self.begin(name)
        try:
            text = await check()
        except ConnectionLostError:
            raise
        except RbeeError as exc:
            self.fail(exc)
        else:
            self.succeed(text)

    def judge(self, name: str, check: Callable[[], str]) -> None:
        """Make a step that only looks at what was found."""
        self.begin(name)
        try:
            text = check()
        except RbeeError as exc:
            self.fail(exc)
        else:
            self.succeed(text)


async def check_node(node: Node, aio: Aio, checkup: Checkup) -> None:
    """Make all steps for a node; what fails is in ``checkup``, not raised."""
    checkup.begin("reachable")
    try:
        await _check(node, aio, checkup)
    except SshKeyError as exc:  # before anything is asked of the network
        if checkup.at == "reachable":
            checkup.begin("auth")
        checkup.fail(exc)
    except RbeeError as exc:
        checkup.fail(exc)
    checkup.end()


async def _check(node: Node, aio: Aio, checkup: Checkup) -> None:
    def note_reached(address: str, port: int) -> None:
        if checkup.at == "reachable":  # the first of several tries
            checkup.succeed(f"{address} port {port}")
            checkup.begin("auth")

    async with open_connection(target_of(node), aio, reached=note_reached) as connection:
        if checkup.at == "reachable":
            checkup.succeed("by the ProxyCommand of the SSH configuration")
            checkup.begin("auth")
        checkup.succeed(f"as {connection.user}, its host key is known")
        await _check_programs(node, connection, checkup)


async def _check_programs(node: Node, connection: Connection, checkup: Checkup) -> None:
    checkup.begin("exec")
    try:
        sight = await look(connection, f"{node.rbee_path}/rbee-hive", env=node.environment)
    except RemotePythonError:
        checkup.succeed(RUNS)
        checkup.begin("python")
        raise
    checkup.succeed(RUNS)
    checkup.begin("python")
    checkup.succeed(f"{'.'.join(map(str, sight.version))}, {sight.python}")
    await _check_way(node, connection, sight.python, checkup)
    checkup.begin("rbee")
    found = await detect(node, connection)
    checkup.succeed(f"{found['rbee']}, {node.rbee_path}")
    try_import = partial(import_engine, node, connection, DEFAULT_ENGINE)
    await check_found(node.name, found, checkup, try_import, connection.target.command)


async def check_here(found: dict[str, Any], checkup: Checkup) -> None:
    """Make for this machine the steps that come after `rbee-hive detect`."""
    await check_found(LOCALHOST, found, checkup, partial(import_here, DEFAULT_ENGINE))


async def check_found(
    name: str, found: dict[str, Any], checkup: Checkup, try_import: TryImport, way: str = ""
) -> None:
    """Make the steps that look at what `rbee-hive detect` said, and whether the engine works."""
    checkup.found = found
    await checkup.attempt("engine", partial(_engines, name, found, try_import))
    checkup.judge("disk", partial(check_disk, name, found, way))
    checkup.judge("memory", partial(_memory, found))
    checkup.judge("gpu", partial(_gpus, found))


async def _engines(name: str, found: Mapping[str, Any], try_import: TryImport) -> str:
    if lacks := lacks_engine(name, found):
        raise NoRbeeError(lacks, hint=install_on(name), code="no_engine", node=name)
    there = {engine: version for engine, version in found["engines"].items() if version}
    if DEFAULT_ENGINE in there and (why := await try_import()):
        raise NoRbeeError(
            f"{DEFAULT_ENGINE} of node {name} does not work: {why}",
            hint=install_on(name, "--force"),
            code="broken_engine",
            node=name,
        )
    return ", ".join(f"{engine} {version}" for engine, version in there.items())


def _memory(found: Mapping[str, Any]) -> str:
    cpu: dict[str, Any] = next((one for one in found["devices"] if one.get("backend") == "cpu"), {})
    free, total = cpu.get("memory_free") or 0, cpu.get("memory_total") or 0
    return f"{human(free)} of {human(total)} free, {found.get('cpus')} CPUs"


def _gpus(found: Mapping[str, Any]) -> str:
    cards = [one for one in found["devices"] if one.get("backend") == "cuda"]
    told = [f"{one.get('name')}, {human(one.get('memory_free') or 0)} free" for one in cards]
    return "; ".join(told) or "none, the CPU computes"


async def _check_way(node: Node, connection: Connection, python: str, checkup: Checkup) -> None:
    """Go the way that requests and tokens will take."""
    direct = node.transport is Transport.DIRECT
    checkup.begin("port" if direct else "latency")
    try:
        async with open_way(node, connection, python) as way:
            if direct:
                checkup.succeed(f"{way.place} is open to us")
            await checkup.attempt("latency", way.latency)
    except ConnectionLostError:
        raise
    except RbeeError as exc:
        checkup.fail(exc)
