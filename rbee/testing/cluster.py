"""A cluster to be killed: a conversation with its queen, guards, hive, zygote and worker."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from rbee.guard import children
from rbee.home import Home, open_home
from rbee.testing.processes import Identity, LeakCheck, Tree, identify, is_running, title_of

PROCESSES = (
    "keeper", "queen guard", "queen", "guard A", "guard B", "hive", "zygote", "worker guard",
    "worker", "engine",
)  # fmt: skip
GUARD_MARKS = ("rbee-guard", "guard.py")
MARKS = {
    "queen guard": GUARD_MARKS,
    "queen": ("queen-rbee", "rbee.queen"),
    "guard A": GUARD_MARKS,
    "guard B": GUARD_MARKS,
    "hive": ("rbee-hive", "rbee.hive"),
    "zygote": ("rbee-zygote", "rbee.hive.zygote"),
    "worker guard": GUARD_MARKS[:1],
    "worker": ("llm-worker-rbee",),
    "engine": ("echo-engine", "EngineCore"),
}


@attrs.frozen
class Workload:
    """What the cluster of a cell runs.

    Attributes:
        model: answers slowly enough to be hit ``streaming``.
        others: what other states want: ``loading`` takes long enough to be hit, and a state after
            the answer does not wait for a long one.
        patience: seconds to wait for a state.
        start: seconds that the first start on a node takes beyond those of any other request.
    """

    engine: str
    model: str
    patience: float
    others: Mapping[str, str] = attrs.field(factory=dict)
    start: float = 0.0

    @classmethod
    def echo(cls) -> Workload:
        quick = "echo?rate=2000"
        others = {"loading": "echo?rate=25&load=3", "idle": quick, "stopping": quick}
        return cls("echo", "echo?rate=25", 60, others)

    @classmethod
    def vllm(cls, model_dir: Path) -> Workload:
        return cls("vllm", str(model_dir), 180, start=60.0)

    def model_for(self, state: str) -> str:
        return self.others.get(state, self.model)


class Cluster:
    """A keeper in conversation, and everything below it."""

    def __init__(self, keeper: subprocess.Popen[bytes], check: LeakCheck, tree: Tree) -> None:
        self.keeper = keeper
        self.check = check
        self.tree = tree
        self.output = b""
        self._more = trio.Event()

    @property
    def keeper_log(self) -> Path:
        """Return the file that takes the keeper's stderr."""
        assert self.check.home is not None
        return self.check.home.root.parent / "keeper.log"

    def environment(self) -> dict[str, str]:
        """Return the environment of a command that is to find this cluster's queen."""
        home = self.check.home
        assert home is not None
        return {
            **os.environ, "RBEE_HOME": str(home.root), "XDG_RUNTIME_DIR": str(home.run.parent),
            "RBEE_NONCE": self.check.nonce, "SPT_NOENV": "1",
        }  # fmt: skip

    def say(self, text: str) -> None:
        assert self.keeper.stdin is not None
        self.keeper.stdin.write(text.encode() + b"\n")
        self.keeper.stdin.flush()

    async def keep_reading(self) -> None:
        assert self.keeper.stdout is not None
        async with trio.lowlevel.FdStream(os.dup(self.keeper.stdout.fileno())) as stream:
            async for data in stream:
                self.output += data
                self._more.set()
                self._more = trio.Event()

    async def until_output(self, size: int) -> None:
        while len(self.output) < size:
            await self._more.wait()

    def locate(self, process: str) -> Identity | None:
        """Find a process by its place in the tree; None while it is not there."""
        for name, identity in self.places():
            if name == process:
                return identity
        return None

    def places(self) -> Iterator[tuple[str, Identity]]:
        pid = self.keeper.pid
        for depth, name in enumerate(PROCESSES):
            if depth:
                pid = next((p for p in children(pid) if self._is(name, p)), 0)
            identity = identify(pid) if pid else None
            if identity is None or not is_running(identity):
                return
            yield name, identity

    def _is(self, name: str, pid: int) -> bool:
        """Tell a lasting child from a passing one, and from the fork that it was a moment ago.

        A signal between fork and exec meets the parent's handler and is lost.
        """
        title = title_of(pid)
        return any(mark in title for mark in MARKS[name])

    async def until_there(self, process: str) -> Identity:
        while (found := self.locate(process)) is None:
            await trio.sleep(0.002)
        return found


@asynccontextmanager
async def open_cluster(
    workload: Workload,
    state: str,
    *,
    more: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    prepare: Callable[[Home], Awaitable[object]] | None = None,
) -> AsyncGenerator[Cluster, None]:
    """Start a conversation in a home of its own; whatever is left afterwards is killed.

    Args:
        state: which it is to be brought into.
        more: further arguments of the keeper, and ``variables`` of its environment.
        prepare: fills the home before the keeper starts.
    """
    base = Path(tempfile.mkdtemp(prefix="rbee-d-", dir="/tmp"))
    try:
        home = open_home_in(base)
        if prepare is not None:
            await prepare(home)
        argv = [*keeper_argv("run", workload.model_for(state), workload), *more]
        async with open_conversation(home, argv, variables=variables) as cluster:
            yield cluster
    finally:
        shutil.rmtree(base, ignore_errors=True)


def open_home_in(base: Path) -> Home:
    """Make a home in ``base``, a short path, with its run directory beside it."""
    return open_home(base / "home", {"XDG_RUNTIME_DIR": str(base)})


@asynccontextmanager
async def open_conversation(
    home: Home, argv: Sequence[str], *, variables: Mapping[str, str] | None = None
) -> AsyncGenerator[Cluster, None]:
    """Start a conversation in a home of `open_home_in`; what is left of it afterwards is killed."""
    nonce = secrets.token_hex(8)
    environ = {
        **os.environ, "RBEE_HOME": str(home.root), "XDG_RUNTIME_DIR": str(home.run.parent),
        "RBEE_NONCE": nonce, "SPT_NOENV": "1", "PYTHONUNBUFFERED": "1", **(variables or {}),
    }  # fmt: skip
    with Tree() as tree:
        # No look at the virtual environment: another cell's keeper between fork and exec has no
        # nonce yet, somebody else's daemon has none at all, and `check.kill` would end them.
        check = LeakCheck(home=home, nonce=nonce, tree=tree, venv=None)
        hear_interrupts()
        with (home.root.parent / "keeper.log").open("wb") as stderr:
            keeper = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environ,
                start_new_session=True,
            )
        cluster = Cluster(keeper, check, tree)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cluster.keep_reading)
                nursery.start_soon(keep_noting, cluster)
                yield cluster
                nursery.cancel_scope.cancel()
        finally:
            check.kill()
            keeper.wait()
            for pipe in (keeper.stdin, keeper.stdout):
                if pipe:
                    pipe.close()


def hear_interrupts() -> None:
    """Undo what a shell's background job or nohup ignores: what we start would be deaf as well."""
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL),
    ):  # fmt: skip
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


async def keep_noting(cluster: Cluster) -> None:
    while True:
        cluster.tree.refresh(cluster.keeper.pid)
        await trio.sleep(0.1)


def keeper_argv(verb: str, model: str, workload: Workload) -> list[str]:
    argv = [sys.executable, "-m", "rbee", verb]
    argv += ["--model", model] if verb == "infer" else [model]
    return [*argv, "--engine", workload.engine, "--max-tokens", "400", "--temperature", "0"]
