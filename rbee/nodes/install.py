"""Putting the running rbee onto a node: its wheel is copied there, `installer` does the rest.

All of it goes through one SSH connection. Cancelling ends what runs on the node; the rbee that was
in use there stays in use until the new one has said what it finds.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import secrets
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import attrs
import trio

from rbee.errors import BadInputError, InsufficientError, NotFoundError, RbeeError
from rbee.hints import TORCH_CPU_INDEX, download, download_rbee
from rbee.home import writing
from rbee.nodes import installer
from rbee.nodes.node import Node
from rbee.nodes.wheel import Wheel, pack_running
from rbee.pip import PipFailure, last_line, why_failed
from rbee.ssh import (
    Connection,
    RemoteMachineError,
    RemoteProgramError,
    RemotePythonError,
    SshError,
    SshTarget,
    Wish,
    open_remote,
)
from rbee.units import human

TORCH = "torch==2.13.0+cpu"  # as in the Makefile, and what the extra cpu pins
# Bytes that an installation takes at its fullest: a wheel, unpacked, beside what is there already.
NEEDED = {"none": 200 << 20, "cpu": 5 << 30, "cuda": 16 << 30}
GRACE = 2.0
OUTPUT = 1 << 28  # of pip, a line at a time
TAIL = 1000
_MISSING = re.compile(r"No matching distribution found for (\S+)")


class Narrate(Protocol):
    """Tell what goes on and how far it is; `rbee.keeper.output.Output.step` is one."""

    def __call__(self, actor: str, action: str, text: str, share: float | None = None) -> None: ...


@attrs.frozen
class Wanted:
    """What is to be on the node.

    Attributes:
        extra: ``cpu``, ``cuda`` or ``none``; "" is ``cuda`` where there is an NVIDIA GPU.
        wheelhouse: a directory of wheels to install from instead of the node's package index.
        python: the node's Python; "" searches one.
        force: install although the same is there.
    """

    extra: str = ""
    wheelhouse: Path | None = None
    python: str = ""
    force: bool = False


@attrs.frozen
class Installed:
    """What is on the node now.

    Attributes:
        venv, python: the environment and its Python, in the node's paths.
        changed: whether it was not there before.
        kept: older environments that something still runs from.
        capabilities: what `rbee-hive detect` says there.
    """

    rbee: str
    extra: str
    python: str
    venv: str
    changed: bool
    kept: tuple[str, ...]
    capabilities: dict[str, Any]


async def install_rbee(
    connection: Connection, node: Node, wanted: Wanted, narrate: Narrate
) -> Installed:
    """Have the node run the same rbee as we do; does nothing if it does already.

    Raises:
        SshError: the node cannot, in words; a pip that fails has its last lines in the details.
        InsufficientError: its disk is too full.
        RbeeError: the wheelhouse or our own installation is no good.
    """
    wheels = find_wheels(wanted)
    with ExitStack() as stack:
        with writing(Path(os.environ.get("TMPDIR") or "/tmp")):
            directory = stack.enter_context(TemporaryDirectory(prefix="rbee-wheel-"))
        wheel = await trio.to_thread.run_sync(pack_running, Path(directory))
        return await _Installation(connection, node, wanted, narrate, wheel, wheels).run()


def find_wheels(wanted: Wanted) -> dict[str, Path] | None:
    """Return the wheels of the wheelhouse by name; rbee's own is not taken from there.

    Raises:
        NotFoundError: there is no such directory.
        BadInputError: there is no wheel in it.
    """
    wheelhouse = wanted.wheelhouse
    if wheelhouse is None:
        return None
    try:
        files = sorted(path for path in wheelhouse.iterdir() if path.is_file())
    except OSError as exc:
        raise NotFoundError(
            f"the wheelhouse {wheelhouse} cannot be read: {exc.strerror}",
            code="unknown_wheelhouse",
            hint=f"ls -ld {shlex.quote(str(wheelhouse))}",
        ) from exc
    wheels = {path.name: path for path in files if path.suffix == ".whl"}
    found = {name: path for name, path in wheels.items() if not name.startswith("rbee-")}
    if not found:
        raise BadInputError(
            f"the wheelhouse {wheelhouse} has no *.whl (needed: all that rbee depends on)",
            hint=download_rbee(wheelhouse, _extra_of(wanted)),
        )
    return found


def _extra_of(wanted: Wanted) -> str:
    """Return the extra for pip; until the node is asked, cpu is as good a guess as any."""
    return {"none": "", "": "cpu"}.get(wanted.extra, wanted.extra)


@attrs.frozen
class _Installation:
    connection: Connection
    node: Node
    wanted: Wanted
    narrate: Narrate
    wheel: Wheel
    wheels: dict[str, Path] | None

    async def run(self) -> Installed:
        order = self._order()
        self._tell("look", "what is there")
        seen = await self._ask("look", order)
        if there := seen["there"]:
            return self._installed(there, changed=False)
        self._check_room(seen)
        wheel = f"{seen['venvs']}/.rbee-{secrets.token_hex(8)}.whl"  # moved by whoever copied it
        await self._copy_all(seen, wheel)
        cpu = seen["extra"] == "cpu"
        torch = {"requirement": TORCH, "index": TORCH_CPU_INDEX} if cpu else None
        order |= {"extra": seen["extra"], "wheel": wheel, "torch": torch}
        return self._installed(await self._ask("install", order), changed=True)

    def _order(self) -> dict[str, Any]:
        return {
            "rbee_path": self.node.rbee_path,
            "extra": self.wanted.extra,
            "python": self.wanted.python,
            "force": self.wanted.force,
            "digest": self.wheel.digest,
            "version": self.wheel.version,
            "name": self.wheel.path.name,
            "wheels": None if self.wheels is None else list(self.wheels),
        }

    def _installed(self, found: dict[str, Any], *, changed: bool) -> Installed:
        kept = tuple(found.pop("kept", ()))
        return Installed(rbee=self.wheel.version, changed=changed, kept=kept, **found)

    def _tell(self, action: str, text: str, share: float | None = None) -> None:
        self.narrate(self.node.name, action, text, share)

    # files ------------------------------------------------------------------------------------
    def _check_room(self, seen: dict[str, Any]) -> None:
        needed, free = NEEDED[seen["extra"]], seen["free"]
        needed += sum(path.stat().st_size for path in self._missing(seen).values())
        if free < needed:
            raise InsufficientError(
                f"node {self.node.name} has not enough disk for rbee with extra {seen['extra']}: "
                f"needed {human(needed)}, free {human(free)} at {seen['venvs']}",
                code="insufficient_disk",
                hint=f"{self.connection.target.command} df -h",
                required=needed,
                available=free,
            )

    def _missing(self, seen: dict[str, Any]) -> dict[str, Path]:
        """Return the wheels that the node does not have, by name and size."""
        there = seen["wheels"]
        return {
            name: path
            for name, path in (self.wheels or {}).items()
            if there.get(name) != path.stat().st_size
        }

    async def _copy_all(self, seen: dict[str, Any], wheel: str) -> None:
        copies = {f"{seen['wheelhouse']}/{n}": path for n, path in self._missing(seen).items()}
        copies[wheel] = self.wheel.path
        total = sum(path.stat().st_size for path in copies.values())
        names = f"{len(copies)} wheels" if len(copies) > 1 else self.wheel.path.name
        done = 0
        for remote, path in copies.items():
            tell = partial(self._tell_copied, f"{names}, {human(total)}", done, total)
            await self._copy(path, remote, tell)
            done += path.stat().st_size

    def _tell_copied(self, text: str, before: int, total: int, done: int, _: int) -> None:
        self._tell("copy", text, (before + done) / total)

    async def _copy(self, local: Path, remote: str, tell: Callable[[int, int], None]) -> None:
        """Copy a file so that it is there whole or not at all under its name."""
        tell(0, 0)
        part = f"{remote}.{secrets.token_hex(4)}.part"  # somebody else may copy the same
        await self.connection.put(local, part, progress=tell)
        await self.connection.rename(part, remote)

    # what runs there --------------------------------------------------------------------------
    async def _ask(self, verb: str, order: dict[str, Any]) -> dict[str, Any]:
        """Run the installer on the node and return what it says last."""
        argv = ["", "-I", "-c", _source(), verb, json.dumps(order)]
        wish = Wish(
            argv, [GRACE], self.connection.lease, env=self.node.environment,
            python=self.wanted.python, bare=True,
        )  # fmt: skip
        last: dict[str, Any] = {}
        async with open_remote(self.connection, wish, limit=OUTPUT) as process:
            take = _Lines(partial(self._take, last))
            while more := await process.read():
                take.feed(more)
            status = await process.wait()
            stderr = process.channel.stderr.strip()[-TAIL:]
        if "done" in last:
            return dict(last["done"])
        if "failed" in last:
            raise failure(self.connection.target, self.wanted, **last["failed"])
        raise SshError(
            f"the installer on node {self.node.name} ended with code {status}",
            hint=f"rbee-keeper node check {self.node.name}",
            node=self.node.name,
            log=stderr,
        )

    def _take(self, last: dict[str, Any], said: dict[str, Any]) -> None:
        if "step" in said:
            last["step"] = said["step"]
            self._tell(said["step"], said["text"])
        elif "line" in said:
            self.narrate("pip", last.get("step", "install"), said["line"], said.get("share"))
        else:
            last |= said


@attrs.define(eq=False)
class _Lines:
    """Takes output apart into its lines of JSON; what a node's own Python adds is none."""

    take: Callable[[dict[str, Any]], None]
    _rest: bytes = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"{"):
                self.take(json.loads(line))


@cache
def _source() -> str:
    return inspect.getsource(installer)


def failure(
    target: SshTarget, wanted: Wanted, *, code: str, message: str, log: str, path: str
) -> RbeeError:
    """Say in our words why the installer has failed."""
    name, ssh = target.node, target.command
    by_hand = f"{ssh} {shlex.quote(shlex.join(['mv', path, f'{path}.before']))}"
    as_root = f"{target.interactive} sudo apt-get install python3-venv"
    told: dict[str, tuple[type[SshError], str, str]] = {
        "foreign": (
            RemoteMachineError,
            f"{message}; rbee is installed only where nothing is, or an rbee from node install",
            by_hand if path else f'rbee-keeper node update {name} --rbee-path ""',
        ),
        "no_pip": (RemotePythonError, message, as_root),
        "venv": (
            RemotePythonError,
            f"no virtual environment can be made: {last_line(log) or message}",
            as_root,
        ),
        "full": (RemoteMachineError, f"the disk is full: {message}", f"{ssh} df -h"),
        "broken": (
            RemoteProgramError,
            f"the new rbee does not run, so it was not put in use: {message}",
            f"rbee-keeper node check {name}",
        ),
        "pip": _pip_failed(target, wanted, message, log),
    }
    kind, what, hint = told.get(code, (RemoteMachineError, message, f"{ssh} df -h"))
    return kind(f"node {name}: {what}", hint=hint, node=name, log=log)


def _pip_failed(
    target: SshTarget, wanted: Wanted, message: str, log: str
) -> tuple[type[SshError], str, str]:
    why = why_failed(log)
    hint = f"{target.command} python3 -m pip config list"
    if why in (PipFailure.OFFLINE, PipFailure.MISSING):
        again = f"rbee-keeper node install {target.node} --wheelhouse wheelhouse"
        hint = download_rbee(Path("wheelhouse"), _extra_of(wanted), then=again)
    if wanted.wheelhouse and (missing := _MISSING.search(log)):
        hint = download(wanted.wheelhouse, missing[1])
    return RemoteMachineError, f"{why.value}: {last_line(log) or message}", hint
