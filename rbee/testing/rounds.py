"""What one round of a storm does: a pure choice from its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import attrs

from rbee.model import LOCALHOST
from rbee.testing.census import OF_WORKER
from rbee.testing.faults import Choice, Fault, draw

MOMENTS = ("starting", "loading", "idle", "streaming", "stopping", "swapping")
NEW = ("starting", "loading")  # a worker is on its way then
NEED_WORKER = ("zygote", *OF_WORKER)
MAX_NODES, MAX_WORKERS = 3, 4


@attrs.frozen
class Round:
    """One round.

    Attributes:
        nodes: which have a hive.
        workers: the node of each worker.
        moment: what goes on when the fault comes, on its node, and ``delay`` for how many seconds.
        by_owner: whether a fault that ends nothing is followed by the end of the cluster.
        is_last: whether the cluster is ended after it, though it could be kept.
    """

    seed: int
    nodes: tuple[str, ...]
    workers: tuple[str, ...]
    moment: str
    delay: float
    fault: Fault
    by_owner: bool
    is_last: bool

    @property
    def node(self) -> str:
        """Where it goes on: on the node of the fault, if that is the cluster's."""
        node = self.fault.blows[0].node
        return node if node in self.nodes else self.nodes[0]

    def __str__(self) -> str:
        where = ", ".join(f"{node} ({self.workers.count(node)})" for node in self.nodes)
        return f"round --seed {self.seed}: {self.moment}, {where}: {self.fault}"


def draw_round(
    seed: int, hosts: Sequence[str], faults: Sequence[str], *, most: int = MAX_WORKERS
) -> Round:
    """Draw the round of a seed: the same from the same hosts and faults.

    Args:
        most: how many workers there may be.
    """
    rng = Random(seed)
    name = rng.choice(faults)
    # Mostly few: a hive takes a second of two cores to start, and faults are about one node.
    nodes = tuple(rng.sample(hosts, rng.choice((1, 1, 1, 2, 2, 3))))
    if len(nodes) < MAX_NODES and rng.random() < 0.4:
        nodes = (*nodes, LOCALHOST)
    moment = rng.choice(MOMENTS)
    fault = draw(name, Choice(rng, nodes))
    workers = [rng.choice(nodes) for _ in range(rng.randint(0, most))]
    for blow in fault.blows:
        if blow.role in NEED_WORKER and blow.node not in workers and moment not in NEW:
            workers = [*workers[: most - 1], blow.node]
    return Round(
        seed=seed,
        nodes=nodes,
        workers=tuple(workers),
        moment=moment,
        delay=rng.uniform(0, 0.3),
        fault=fault,
        by_owner=rng.random() < 0.5,
        is_last=rng.random() < 0.1,
    )
