"""``python -m rbee.testing.network_deaths``: end whatever can end between a queen and its node.

A cell is one strike × one moment. Each starts a conversation whose model runs on a throw-away host
behind real sshd (`rbee.testing.hosts`), as an ordinary user with a lease of 3 s, strikes, and
measures how long it takes until no process of rbee is left on the host. Strikes that end a part
only are held to that part; whoever must live is looked at as well: where the queen does, the answer
that was cut ends with an error and, after a kill, the next one comes.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from rbee.errors import leaves
from rbee.guard import send_signal
from rbee.home import Home
from rbee.model import node_name
from rbee.nodes.node import Node, Transport
from rbee.nodes.store import NodeStore
from rbee.process import log_tail
from rbee.testing.cluster import MARKS, Cluster, Workload, open_cluster
from rbee.testing.hosts import Host, HostProcess, Hosts, open_hosts_sync
from rbee.testing.processes import Identity, LeakError, is_running
from rbee.testing.verdict import ERROR, TRACEBACK, Fault, problems
from rbee.web.client import call, open_client
from rbee.wire import messages

LEASE = 3.0
KILLING = 8.0  # seconds until nothing is left once the node knows
FENCE = LEASE + 8 + 20  # seconds for a new start: what was lost may be fenced first
STATES = ("starting", "idle", "streaming")
BELOW = ("guard A", "guard B", "hive", "zygote", "worker guard", "worker")
PARTS = ("zygote", "worker guard", "worker")  # the hive lives on


class NetworkError(AssertionError):
    """A cell did not hold."""


@attrs.frozen(eq=False)
class Strike:
    """One thing that goes wrong.

    Attributes:
        victims: what SIGKILL (or ``number``) is sent to; on the node, or ``queen`` and ``keeper``.
        cut: the network is cut, ``sessions``: the node's sshd sessions are killed.
        silent: the node hears nothing: it has to wait for its lease.
        workload: what runs meanwhile.
        babbles: the hive fills its output from then on, whoever reads it.
    """

    name: str
    victims: tuple[str, ...] = ()
    number: signal.Signals = signal.SIGKILL
    cut: bool = False
    sessions: bool = False
    shutdown: bool = False
    silent: bool = False
    babbles: bool = False
    workload: Workload = attrs.field(factory=Workload.echo)
    transport: Transport = Transport.DIRECT
    states: tuple[str, ...] = STATES

    @property
    def within(self) -> float:
        """Seconds in which nothing may be left on the node."""
        return KILLING + (LEASE if self.silent else 0.0)

    @property
    def goes_on(self) -> bool:
        """Whether the queen lives, and the node is there to answer again."""
        return bool(self.victims) and self.victims[0] in BELOW

    @property
    def is_part(self) -> bool:
        return bool(self.victims) and self.victims[0] in PARTS

    @property
    def ends_the_queen(self) -> bool:
        is_frozen = self.number == signal.SIGSTOP
        return self.shutdown or ("queen" in self.victims and not is_frozen)

    @property
    def fault(self) -> tuple[str, signal.Signals]:
        """What it is to the keeper, as `rbee.testing.verdict` knows it."""
        if self.ends_the_queen:
            return "queen", signal.SIGKILL
        return ("keeper" if "keeper" in self.victims else "hive"), signal.SIGKILL


# Imported by every Python of the node: the real hive, and a thread that nothing stops.
BABBLE = """
import os, sys, threading, time

def babble(flag):
    while not os.path.exists(flag):
        time.sleep(0.01)
    while True:
        os.write(1, b"bla " * 16384)

if "daemon" in sys.orig_argv:
    flag = os.path.join(os.path.dirname(__file__), "now")
    threading.Thread(target=babble, args=[flag], daemon=True).start()
"""
FLOOD = Workload("echo", "echo?rate=20000", 60)
STRIKES = (
    Strike("shutdown of the queen", shutdown=True),
    Strike("SIGTERM queen", ("queen",), signal.SIGTERM),
    Strike("SIGKILL queen", ("queen",)),
    Strike("SIGSTOP queen", ("queen",), signal.SIGSTOP, silent=True),
    Strike("SIGKILL keeper", ("keeper",)),
    Strike("partition", cut=True, silent=True),
    Strike(
        "partition in a flood", cut=True, silent=True, workload=FLOOD, transport=Transport.SSH,
        states=("streaming",),
    ),
    Strike("partition, a flood of output", cut=True, silent=True, babbles=True),
    Strike("SIGKILL sshd's sessions", sessions=True),
    Strike("SIGKILL hive", ("hive",)),
    Strike("SIGKILL guard A", ("guard A",)),
    Strike("SIGKILL guard B", ("guard B",)),
    Strike("SIGKILL both guards", ("guard A", "guard B")),
    Strike("SIGKILL both guards and hive", ("guard A", "guard B", "hive")),
    Strike("SIGKILL zygote", ("zygote",)),
    Strike("SIGKILL worker's guard", ("worker guard",)),
    Strike("SIGKILL worker", ("worker",)),
)  # fmt: skip


@attrs.frozen
class Cell:
    strike: Strike
    state: str

    def __str__(self) -> str:
        return f"{self.strike.name}, {self.state}"


@attrs.frozen
class Result:
    """``seconds``: from the strike until nothing was left of what it ends, on the node."""

    cell: Cell
    seconds: float
    problem: str = ""


def all_cells() -> list[Cell]:
    return [Cell(strike, state) for strike in STRIKES for state in strike.states]


def rotated_cells() -> list[Cell]:
    """Each strike once, the states taken in turn."""
    return [Cell(one, one.states[row % len(one.states)]) for row, one in enumerate(STRIKES)]


# a cluster with one node ----------------------------------------------------------------------
@attrs.define(eq=False)
class Far:
    """A conversation, and the host on which its model runs."""

    cluster: Cluster
    host: Host

    def places(self) -> dict[str, HostProcess]:
        """Return what is on the node, by its place in the tree, as far as it is there."""
        left = {one.pid: one for one in self.host.processes()}
        found: dict[str, HostProcess] = {}
        above = {0, *(one.parent for one in left.values())} - left.keys()
        for name in BELOW:
            here = [one for one in left.values() if one.parent in above and _is(name, one)]
            if not here:
                return found
            found[name] = here[0]
            above = {here[0].pid}
        return found

    async def until_there(self, name: str) -> None:
        while name not in self.places():
            await trio.sleep(0.005)

    def local(self) -> dict[str, Identity]:
        """Return what is on this machine."""
        return dict(self.cluster.places())


def _is(name: str, process: HostProcess) -> bool:
    return any(mark in process.title for mark in MARKS[name])


@asynccontextmanager
async def open_far(
    hosts: Hosts,
    name: str,
    workload: Workload,
    state: str,
    *,
    transport: Transport = Transport.DIRECT,
    babbles: bool = False,
) -> AsyncGenerator[Far, None]:
    """Start a conversation whose model is to run on a host; its home is removed afterwards."""

    async def prepare(home: Home) -> None:
        home.config_file.write_text(f"[queen]\nlease = {LEASE:g}\n")
        node = Node(
            node_name(name), ssh_alias=name, rbee_path=f"{sys.prefix}/bin", transport=transport,
            environment=_babbling(hosts[name]) if babbles else {},
        )  # fmt: skip
        await NodeStore.of(home).add(node)

    variables = {"HOME": str(client_home(hosts))}
    opened = open_cluster(
        workload, state, more=["--node", name], variables=variables, prepare=prepare
    )
    async with opened as cluster:
        yield Far(cluster, hosts[name])


def _babbling(host: Host) -> dict[str, str]:
    """Return the environment in which a host's hive floods its output once it is told to."""
    directory = _babble_of(host)
    directory.mkdir(exist_ok=True)
    (directory / "now").unlink(missing_ok=True)
    (directory / "sitecustomize.py").write_text(BABBLE)
    return {"PYTHONPATH": str(directory)}


def _babble_of(host: Host) -> Path:
    return host.home / "babble"


def client_home(hosts: Hosts) -> Path:
    """Return a ``HOME`` whose ssh_config knows the hosts."""
    config = hosts.directory / "client" / ".ssh" / "config"
    if not config.exists():
        config.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        config.write_text(hosts.ssh_config.read_text())
    return config.parents[1]


# one cell -------------------------------------------------------------------------------------
async def run_cell(cell: Cell, hosts: Hosts, name: str) -> Result:
    """Run one cell; what did not hold is in the result, not raised."""
    began = trio.current_time()
    strike, host = cell.strike, hosts[name]
    try:
        opened = open_far(
            hosts, name, strike.workload, cell.state,
            transport=strike.transport, babbles=strike.babbles,
        )  # fmt: skip
        async with opened as far:
            try:
                return Result(cell, await _run(cell, far))
            except (NetworkError, LeakError, trio.TooSlowError) as exc:
                exc.add_note(_explain(far))
                raise
    except BaseExceptionGroup as group:
        matched, rest = group.split((NetworkError, LeakError, trio.TooSlowError))
        if rest is not None:
            raise
        assert matched is not None
        return Result(cell, trio.current_time() - began, _in_words(matched))
    finally:
        if host.can_partition:
            host.heal()
        for process in host.processes():
            process.signal()


def _in_words(group: BaseException) -> str:
    notes = ([repr(error), *getattr(error, "__notes__", ())] for error in leaves(group))
    return "\n".join(line for lines in notes for line in lines)


async def _run(cell: Cell, far: Far) -> float:
    strike = cell.strike
    await reach(cell, far)
    began = trio.current_time()
    with _what_must_go(cell, far) as gone:
        await strike_at(strike, far)
        await gone()
    took = trio.current_time() - began
    if strike.goes_on and cell.state == "streaming":
        await _check_goes_on(far)
    await _end(cell, far)
    return took


async def reach(cell: Cell, far: Far) -> None:
    """Bring the cluster into the cell's state."""
    strike, cluster = cell.strike, far.cluster
    on_node = [name for name in strike.victims if name in BELOW]
    with trio.fail_after(strike.workload.patience):
        cluster.say("one two three four five")
        if cell.state == "starting":
            await far.until_there(on_node[-1] if on_node else "guard A")
        elif cell.state == "streaming":
            await cluster.until_output(12)
        else:
            while not cluster.output.endswith(b"\n"):
                await cluster.until_output(len(cluster.output) + 1)
        cluster.tree.refresh(cluster.keeper.pid)


async def strike_at(strike: Strike, far: Far) -> None:
    """Do it."""
    local, there = far.local(), far.places()
    if strike.cut:
        far.host.partition()
    if strike.babbles:
        (_babble_of(far.host) / "now").touch()
    if strike.sessions:
        far.host.kill_sessions()
    if strike.shutdown:
        await _shut_down(far)
    for name in strike.victims:
        if name in there:
            there[name].signal(strike.number)
        else:
            send_signal(local[name].pid, local[name].start, strike.number)


async def _shut_down(far: Far) -> None:
    home = far.cluster.check.home
    assert home is not None
    record = json.loads(home.queen_file.read_text())
    token = Path(record["token_file"]).read_text().strip()
    async with open_client(record["url"], token) as client:
        await call(client, "POST", messages.SHUTDOWN, type(None), what="queen")


@contextmanager
def _what_must_go(cell: Cell, far: Far) -> Iterator[Callable[[], Awaitable[None]]]:
    """Note what the strike must end; yield what waits for that."""
    if not cell.strike.is_part:
        yield partial(_until_empty, far.host, cell.strike.within)
        return
    there = far.places()
    lost = BELOW[BELOW.index("zygote" if cell.strike.victims[0] == "zygote" else "worker guard") :]
    identities = [there[name].identity for name in lost if name in there]

    async def gone() -> None:
        with trio.fail_after(cell.strike.within):
            while any(is_running(one) for one in identities):
                await trio.sleep(0.01)
        if "hive" not in far.places():
            raise NetworkError("the hive ended with a part of it")

    yield gone


async def _until_empty(host: Host, within: float) -> None:
    await host.wait_empty(within)


async def _check_goes_on(far: Far) -> None:
    """See that the answer that was cut says so, and that the next one comes from the node."""
    cluster = far.cluster
    with _failing_after(KILLING, "the answer that was cut did not end with an error"):
        while not ERROR.search(cluster.keeper_log.read_text(errors="replace")):
            await trio.sleep(0.02)
    cluster.say("again")
    with _failing_after(FENCE, "no answer came after it"):
        await cluster.until_output(len(cluster.output) + 12)
    if "worker" not in far.places():
        raise NetworkError("the next answer came from somewhere else")


@contextmanager
def _failing_after(seconds: float, what: str) -> Iterator[None]:
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise NetworkError(f"{what} within {seconds:g} s")


async def _end(cell: Cell, far: Far) -> None:
    """End the conversation, and see that nothing is left at either end."""
    strike, cluster = cell.strike, far.cluster
    if strike.cut:
        far.host.heal()
    if strike.number == signal.SIGSTOP:
        queen = far.local()["queen"]
        send_signal(queen.pid, queen.start, signal.SIGCONT)
    if not strike.ends_the_queen and "keeper" not in strike.victims:
        if cluster.keeper.poll() is not None:
            raise NetworkError(f"the keeper ended with {cluster.keeper.poll()}")
        cluster.keeper.send_signal(signal.SIGTERM)
    with trio.fail_after(15):
        while cluster.keeper.poll() is None:
            await trio.sleep(0.01)
        await cluster.check.wait_clean(10)
    await far.host.wait_empty(KILLING)
    _check_said(cell, far)


def _check_said(cell: Cell, far: Far) -> None:
    cluster, home = far.cluster, far.cluster.check.home
    assert home is not None
    process, number = cell.strike.fault
    fault = Fault(process, number, cell.state)
    wrong = list(problems(fault, cluster.keeper.poll(), cluster.keeper_log, home))
    for log in (far.host.home / ".rbee" / "logs").glob("*.log"):
        wrong += [
            f"a traceback in {log.name}:\n{found}"
            for found in TRACEBACK.findall(log.read_text(errors="replace"))
        ]
        log.unlink()
    if wrong:
        raise NetworkError("\n".join(wrong))


def _logs_there(host: Host) -> list[Path]:
    return sorted((host.home / ".rbee" / "logs").glob("*.log"))


def _explain(far: Far) -> str:
    home = far.cluster.check.home
    assert home is not None
    lines = [f"{one.pid} {one.title}" for one in far.host.processes()]
    logs = [far.cluster.keeper_log, *sorted(home.logs.glob("*.log"))]
    for path in (*logs, *_logs_there(far.host)):
        lines += [f"--- {path.name}", log_tail(path, 1500)]
    return "\n".join(lines)


# all cells ------------------------------------------------------------------------------------
async def run_cells(cells: Sequence[Cell], hosts: Hosts, *, report: Any = None) -> list[Result]:
    """Run cells, one on each host at a time, and return their results in order."""
    results: dict[Cell, Result] = {}
    send, free = trio.open_memory_channel[str](len(hosts))
    for name in hosts:
        send.send_nowait(name)

    async def one(cell: Cell, name: str) -> None:
        results[cell] = await run_cell(cell, hosts, name)
        if report is not None:
            report(results[cell])
        send.send_nowait(name)

    async with trio.open_nursery() as nursery:
        for cell in cells:
            nursery.start_soon(one, cell, await free.receive())
    return [results[cell] for cell in cells]


def table(results: Sequence[Result]) -> str:
    """Lay the results out as Markdown: a row per strike, a column per state."""
    found = {(one.cell.strike, one.cell.state): one for one in results}
    lines = [f"| strike | {' | '.join(STATES)} | at most |", "|---" * (len(STATES) + 2) + "|"]
    for strike in dict.fromkeys(one.cell.strike for one in results):
        texts = [_text(found.get((strike, state))) for state in STATES]
        lines.append(f"| {strike.name} | {' | '.join(texts)} | {strike.within:g} |")
    return "\n".join(lines)


def _text(result: Result | None) -> str:
    if result is None:
        return ""
    return "**left**" if result.problem else f"{result.seconds:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m rbee.testing.network_deaths"
    )
    parser.add_argument("--rotated", action="store_true", help="each strike once")
    parser.add_argument("--only", default="", help="only cells whose name holds this text")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    cells = rotated_cells() if options.rotated else all_cells()
    cells = [cell for cell in cells if options.only in str(cell)]
    names = [f"n{number}" for number in range(options.at_once)]
    failed = 0
    with open_hosts_sync(*names) as hosts:
        for _ in range(options.rounds):
            results = trio.run(partial(run_cells, cells, hosts, report=_report))
            sys.stdout.write(table(results) + "\n")
            lost = sum(bool(result.problem) for result in results)
            sys.stdout.write(f"{len(results) - lost} of {len(results)} cells held\n")
            failed += lost
    return 1 if failed else 0


def _report(result: Result) -> None:
    what = f"FAILED: {result.problem}" if result.problem else f"{result.seconds:6.2f} s"
    sys.stderr.write(f"{result.cell!s:50} {what}\n")


if __name__ == "__main__":
    sys.exit(main())
