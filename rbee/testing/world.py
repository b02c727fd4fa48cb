"""The machines of a storm and the cluster on them, which is kept as far as it is unhurt."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from rbee.client import AsyncClient
from rbee.daemon import read_run_file
from rbee.errors import RbeeError
from rbee.gpus import all_gpus
from rbee.guard import remove_tree
from rbee.home import Home
from rbee.model import LOCALHOST, node_name
from rbee.models.catalog import Catalog, Entry, File
from rbee.nodes.node import Node
from rbee.nodes.store import NodeStore
from rbee.testing.blows import FILLER, Field
from rbee.testing.census import SESSION, Census, Placed, ownerless, take_census
from rbee.testing.cluster import Cluster, Workload, keeper_argv, open_conversation, open_home_in
from rbee.testing.host import Host, all_processes
from rbee.testing.network_deaths import LEASE
from rbee.testing.processes import LeakError, Leftover, is_running, title_of
from rbee.testing.verdict import TRACEBACK

POLL = 0.03
DISK = "256m"  # of a host: all that it writes
RECORD = "storm"  # the model in each catalog
GPU_SLACK = 64 << 20  # bytes that a driver keeps for itself, or another program takes


@attrs.define(eq=False)
class World:
    """Hosts, a home that knows them as nodes, and the cluster that runs there now, if any.

    Attributes:
        hosts: by the names of their nodes.
        fenced: until when something of a lost hive may still run on a node, in trio's time.
    """

    workload: Workload
    hosts: Mapping[str, Host]
    variables: Mapping[str, str]
    home: Home
    nursery: trio.Nursery
    cluster: Cluster | None = None
    client: AsyncClient | None = None
    fenced: dict[str, float] = attrs.field(factory=dict)
    _over: trio.Event = attrs.field(factory=trio.Event)
    _ended: trio.Event = attrs.field(factory=trio.Event)
    _gpus: dict[int, int] = attrs.field(factory=lambda: {one.index: one.free for one in all_gpus()})

    # the cluster --------------------------------------------------------------------------------
    async def start(self) -> Cluster:
        """Start a keeper; its queen is on its way."""
        self._over, self._ended = trio.Event(), trio.Event()
        cluster: Cluster = await self.nursery.start(self._keep)
        return cluster

    async def _keep(self, *, task_status: trio.TaskStatus[Cluster]) -> None:
        argv = keeper_argv("run", self.workload.model, self.workload)
        opened = open_conversation(self.home, argv, variables=self.variables)
        try:
            async with opened as self.cluster:
                users = {os.getuid(), *(host.uid for host in self.hosts.values())}
                self.cluster.check = attrs.evolve(self.cluster.check, users=users)
                task_status.started(self.cluster)
                await self._over.wait()
        finally:
            self.cluster = self.client = None
            self.fenced.clear()
            self._ended.set()

    async def forget(self) -> None:
        """Let go of a cluster; whatever still runs of it is killed."""
        self._over.set()
        await self._ended.wait()

    async def connect(self) -> AsyncClient:
        """Return a client of the queen, once she serves."""
        while self.client is None:
            self.client = _client_of(self.home)
            await trio.sleep(0 if self.client else POLL)
        return self.client

    # who is there -------------------------------------------------------------------------------
    def census(self) -> Census:
        assert self.cluster is not None
        return take_census(self.cluster.keeper.pid, self.hosts)

    def field(self) -> Field:
        return Field(self.hosts, self.census())

    async def until_there(self, role: str, node: str) -> None:
        while not self.census().find(role, node):
            await trio.sleep(POLL)

    # what is left -------------------------------------------------------------------------------
    def left(self) -> list[Leftover]:
        """List what is there that must not be, now that the cluster has ended."""
        assert self.cluster is not None
        found = [*self.cluster.check.find()]
        found += self._on_hosts(spare=())
        for node, host in self.hosts.items():
            found += _files(node, run_of(host))
        return found

    def _on_hosts(self, spare: Collection[int]) -> Iterator[Leftover]:
        for host, processes in all_processes(self.hosts.values()).items():
            for one in processes:
                if one.pid not in spare:
                    what = f"{one.title!r} [{one.pid}]"
                    yield Leftover("process", what, f"on {host.name}", one.pid)

    async def surplus(self) -> list[Leftover]:
        """List what is there that no hive or worker answers for, in a cluster that runs."""
        assert self.cluster is not None
        client = await self.connect()
        pids = {info.pid for info in await client.workers() if info.state != "failed"}
        census = self.census()
        kept = census.below(census.placed) - census.below(_unknown(census, pids))
        spare = {one.pid for one in kept}
        found = [one for one in self.cluster.check.find(spare=spare) if one.kind != "file"]
        found += ownerless(self.home.run)
        found += self._on_hosts(spare)
        for host in self.hosts.values():
            found += ownerless(run_of(host))
        return [one for one in found if one.kind != "process" or title_of(one.pid)]

    async def wait_gone(self, within: float) -> None:
        """Wait until nothing is left of the cluster.

        Raises:
            LeakError: something is left after ``within`` seconds.
        """
        began = trio.current_time()
        await self.wait_known_gone(within)
        while left := self.left():
            if trio.current_time() - began > within:
                raise LeakError(left, within)
            await trio.sleep(POLL)

    async def wait_known_gone(self, within: float) -> None:
        """Wait until nobody who was ever seen runs: quick to see, unlike `left`."""
        assert self.cluster is not None
        seen = {one.identity for one in self.census().placed if one.role != SESSION}
        seen |= set(self.cluster.tree.noted)
        with trio.move_on_after(within):
            while seen := {one for one in seen if is_running(one)}:
                await trio.sleep(POLL)

    async def wait_balanced(self, within: float) -> None:
        """Wait until whatever is there belongs to a hive or worker that the queen knows.

        Raises:
            LeakError: something else is there after ``within`` seconds.
        """
        began = trio.current_time()
        while left := await self.surplus():
            if trio.current_time() - began > within:
                raise LeakError(left, within)
            await trio.sleep(POLL)

    # what must be as it was ---------------------------------------------------------------------
    async def damages(self) -> list[str]:
        """Tell what a fault has done to the registry, the catalogs and the GPUs' memory."""
        found = []
        try:
            nodes = {str(node.name) for node in await NodeStore.of(self.home).all()}
            if nodes != set(self.hosts):
                found.append(f"the registry has {sorted(nodes)}, not {sorted(self.hosts)}")
        except RbeeError as exc:
            found.append(f"the registry: {exc}")
        for where, models in self._catalogs():
            items = Catalog(models).items()
            if [(item.name, item.damage) for item in items] != [(RECORD, "")]:
                found.append(f"the catalog of {where}: {items}")
        return found

    def gpu_losses(self) -> list[Leftover]:
        """Tell which GPU has not its memory back; for when nothing of the cluster runs."""
        return [
            Leftover("memory", f"{self._gpus[one.index] - one.free} bytes", f"of GPU {one.index}")
            for one in all_gpus()
            if one.free < self._gpus[one.index] - GPU_SLACK
        ]

    def _catalogs(self) -> Iterator[tuple[str, Path]]:
        yield LOCALHOST, self.home.models
        for node, host in self.hosts.items():
            yield node, seen_on(host, host.home / ".rbee" / "models")

    def tracebacks(self) -> list[str]:
        """Return what the logs tell of bugs, and empty them."""
        found = []
        for path in self.logs():
            text = path.read_text(errors="replace") if path.is_file() else ""
            found += [f"{path.name}: {trace[-2000:]}" for trace in TRACEBACK.findall(text)]
        return found

    def logs(self) -> list[Path]:
        """List the files that its processes write to."""
        found = [self.home.root.parent / "keeper.log", *sorted(self.home.logs.rglob("*.log*"))]
        for host in self.hosts.values():
            found += sorted(seen_on(host, host.home / ".rbee" / "logs").rglob("*.log*"))
        return found

    def wreck(self) -> None:
        """Kill and remove whatever is left, for the next round to begin with nothing."""
        if self.cluster is not None:
            self.cluster.check.kill()
        for host in self.hosts.values():
            for process in host.processes():
                process.signal()
            _empty(run_of(host))
        _empty(self.home.run)

    def clear_logs(self) -> None:
        for path in self.logs():
            path.unlink(missing_ok=True)


def _client_of(home: Home) -> AsyncClient | None:
    """Make a client of the queen that lives; of one that lost its power the file stays."""
    record = read_run_file(home.queen_file)
    if record is None:
        return None
    try:
        token = Path(record.token_file).read_text().strip()
    except OSError:  # it is ending
        return None
    # One that has not asked for the owner tells a stream that breaks from one that ends.
    return AsyncClient(record.url, token)


def _unknown(census: Census, known: set[int]) -> list[Placed]:
    """Return the guards of workers of which the queen knows neither guard nor worker."""
    guards = {one.worker for one in census.placed if one.worker}
    guards -= {one.worker for one in census.placed if one.pid in known}
    return [one for one in census.placed if one.pid in guards]


def _files(node: str, run: Path) -> Iterator[Leftover]:
    for path in sorted(run.rglob("*")) if run.is_dir() else ():
        if path.suffix != ".lock" and path.name != FILLER:
            yield Leftover("file", str(path), f"in the run directory of {node}")


def _empty(run: Path) -> None:
    for path in run.iterdir():
        if path.suffix != ".lock":
            remove_tree(str(path))


# the hosts' files -------------------------------------------------------------------------------
def seen_on(host: Host, path: Path) -> Path:
    """Return what a host calls ``path``, by a name that holds here: it has mounts of its own."""
    return Path(f"/proc/{host.init.pid}/root{path}") if host.network else path


def run_of(host: Host) -> Path:
    """Return the run directory of a host's user."""
    link = seen_on(host, host.home / ".rbee" / "run")
    return seen_on(host, link.readlink())


def _furnish(host: Host) -> None:
    """Give a host's user a home of rbee's with a model in its catalog, on a small disk."""
    make = "from rbee.home import open_home; print(open_home().run)"
    run = Path(host.run([sys.executable, "-c", make]).stdout.strip())
    root = host.home / ".rbee"
    if host.network:
        for path in (run, root):
            options = f"size={DISK},mode=700,uid={host.uid},gid={host.gid}"
            host.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], root=True)
    host.run([sys.executable, "-c", make])
    write = f"from rbee.testing.world import write_record; write_record({str(root / 'models')!r})"
    host.run([sys.executable, "-c", write])


def write_record(models: str) -> None:
    """Put a model into a catalog, which has to be as it was after every round."""
    directory = Path(models) / RECORD
    directory.mkdir()
    (directory / "weights").write_bytes(b"12345")
    entry = Entry("file:/storm", "file", "", (File("weights", 5),), "float32")
    Catalog(Path(models)).save(RECORD, entry)


@asynccontextmanager
async def open_world(
    hosts: Mapping[str, Host], workload: Workload, variables: Mapping[str, str]
) -> AsyncGenerator[World, None]:
    """Own a world while the body runs; whatever is left of its cluster is killed."""
    base = Path(tempfile.mkdtemp(prefix="rbee-s-", dir="/tmp"))
    try:
        home = open_home_in(base)
        home.config_file.write_text(f"[queen]\nlease = {LEASE:g}\nport = 0\n")
        write_record(str(home.models))
        for name, host in hosts.items():
            node = Node(node_name(name), ssh_alias=host.name, rbee_path=f"{sys.prefix}/bin")
            await NodeStore.of(home).add(node)
            await trio.to_thread.run_sync(_furnish, host)
        async with trio.open_nursery() as nursery:
            world = World(workload, hosts, variables, home, nursery)
            yield world
            if world.cluster is not None:
                await world.forget()
    finally:
        shutil.rmtree(base, ignore_errors=True)
