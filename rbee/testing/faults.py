"""Faults: what a storm does to a cluster, blow by blow, and how it is drawn."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from random import Random

import attrs

from rbee.model import LOCALHOST
from rbee.testing.blows import (
    WAYS,
    Blow,
    Cut,
    FullDisk,
    Impairment,
    MemoryLimit,
    OomKill,
    PowerLoss,
    Reach,
    Signal,
    SshdDeath,
    reach_of,
)
from rbee.testing.census import ON_NODE, SESSION
from rbee.testing.cluster import PROCESSES
from rbee.testing.deaths import OWNERS


@attrs.frozen
class Fault:
    """Blows in a row; ``pauses`` are the seconds before each."""

    name: str
    blows: tuple[Blow, ...]
    pauses: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {', then '.join(map(str, self.blows))}"

    @property
    def silent(self) -> bool:
        return any(blow.silent for blow in self.blows)

    @property
    def lasts(self) -> bool:
        return any(blow.lasts for blow in self.blows)

    @property
    def ends_all(self) -> bool:
        return any(blow.reach == Reach.ALL for blow in self.blows)

    def has(self, *kinds: type[Blow]) -> bool:
        return any(isinstance(blow, kinds) for blow in self.blows)

    @property
    def signals(self) -> list[Signal]:
        return [blow for blow in self.blows if isinstance(blow, Signal)]

    @property
    def frozen(self) -> list[str]:
        """Return the roles of what it freezes."""
        return [blow.role for blow in self.signals if blow.freezes]

    @property
    def unswept(self) -> set[str]:
        """Return the machines on which nobody is left to clean: the next daemon there does it.

        On its own machine a queen sweeps after a hive, and a keeper after a queen.
        """
        killed = {(b.role, b.node) for b in self.signals if b.number == signal.SIGKILL}
        found = {blow.node for blow in self.blows if isinstance(blow, PowerLoss)}
        if {("keeper", LOCALHOST), ("queen guard", LOCALHOST)} <= killed:
            found.add(LOCALHOST)
        nodes = {node for role, node in killed if node != LOCALHOST}
        return found | {n for n in nodes if {("guard A", n), ("guard B", n)} <= killed}

    @property
    def aim(self) -> Reach:
        """How much of the cluster is below the first of what it hits, whatever becomes of that."""
        first = self.blows[0]
        return reach_of(first.role) if first.role else first.reach

    def timed(self) -> Iterable[tuple[float, Blow]]:
        return zip(self.pauses or (0.0,) * len(self.blows), self.blows, strict=True)


@attrs.frozen
class Choice:
    """What a fault is drawn from: a round's nodes; the first is a throw-away host."""

    rng: Random
    nodes: tuple[str, ...]

    def node(self) -> str:
        return self.rng.choice(self.nodes)

    def host(self) -> str:
        return self.rng.choice([name for name in self.nodes if name != LOCALHOST])

    def places(self, count: int) -> list[tuple[str, str]]:
        """Draw some roles with their nodes, each at most once."""
        above = [(role, LOCALHOST) for role in PROCESSES if role not in ON_NODE]
        below = [(role, node) for node in self.nodes for role in ON_NODE]
        sessions = [(SESSION, node) for node in self.nodes if node != LOCALHOST]
        # By role first: else what there is on each node would crowd out the keeper.
        found: list[tuple[str, str]] = []
        while len(found) < count:
            role = self.rng.choice((*PROCESSES, SESSION))
            place = self.rng.choice([one for one in (*above, *below, *sessions) if one[0] == role])
            if place not in found:
                found.append(place)
        return found


def _signal(number: signal.Signals, count: int = 1) -> Callable[[Choice], Fault]:
    def draw(choice: Choice) -> Fault:
        return Fault("", tuple(Signal(number, *place) for place in choice.places(count)))

    return draw


def _twice(choice: Choice) -> Fault:
    role = choice.rng.choice(("keeper", "queen", "hive"))
    blow = Signal(signal.SIGTERM, role, LOCALHOST if role in OWNERS else choice.node())
    return Fault("", (blow, blow), (0.0, choice.rng.uniform(0, 0.6)))


def _during_cleanup(choice: Choice) -> Fault:
    first, second = choice.places(2)
    number = choice.rng.choice((signal.SIGTERM, signal.SIGKILL))
    blows = (Signal(number, *first), Signal(signal.SIGKILL, *second))
    return Fault("", blows, (0.0, choice.rng.uniform(0, 0.6)))


def _limit(choice: Choice) -> Fault:
    if choice.rng.random() < 0.4:
        return Fault("", (OomKill(choice.node()),))
    role = choice.rng.choice(("queen", "guard B", "hive", "zygote", "worker guard", "worker"))
    node = LOCALHOST if role in OWNERS else choice.node()
    return Fault("", (MemoryLimit(role, node),))


FAULTS: dict[str, Callable[[Choice], Fault]] = {
    "INT": _signal(signal.SIGINT),
    "TERM": _signal(signal.SIGTERM),
    "HUP": _signal(signal.SIGHUP),
    "KILL": _signal(signal.SIGKILL),
    "STOP": _signal(signal.SIGSTOP),
    "two KILLs": _signal(signal.SIGKILL, 2),
    "three KILLs": _signal(signal.SIGKILL, 3),
    "TERM twice": _twice,
    "during cleanup": _during_cleanup,
    "partition": lambda choice: Fault("", (Cut(choice.host()),)),
    "one-way partition": lambda choice: Fault(
        "", (Cut(choice.host(), (choice.rng.choice(WAYS),)),)
    ),
    "50 % loss": lambda choice: Fault("", (Impairment(choice.host(), loss=0.5),)),
    "500 ms delay": lambda choice: Fault("", (Impairment(choice.host(), delay=0.5),)),
    "sshd killed": lambda choice: Fault("", (SshdDeath(choice.host()),)),
    "memory limit": _limit,
    "disk full": lambda choice: Fault("", (FullDisk(choice.host()),)),
    "power loss": lambda choice: Fault("", (PowerLoss(choice.node()),)),
}
NEED_NAMESPACES = frozenset(
    {"partition", "one-way partition", "50 % loss", "500 ms delay", "disk full"}
)


def draw(name: str, choice: Choice) -> Fault:
    """Draw the particulars of a fault."""
    return attrs.evolve(FAULTS[name](choice), name=name)
