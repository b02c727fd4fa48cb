"""First come, first served within a priority, and nothing that is free is waited for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from rbee.queen.queue import Queue, Rank


@attrs.frozen(eq=False)
class Request:
    """What waits; ``node``: "" is any."""

    rank: Rank
    model: str
    node: str

    @property
    def kind(self) -> tuple[str, str]:
        return self.model, self.node


@attrs.define(eq=False)
class Worker:
    model: str
    node: str
    slots: int
    at: int = 0
    is_there: bool = True

    def fits(self, one: Request) -> bool:
        return self.is_there and self.model == one.model and one.node in ("", self.node)


models = st.sampled_from(["a", "b"])
nodes = st.sampled_from(["n1", "n2"])


class Serving(RuleBasedStateMachine):
    """A queue in front of workers that come, go, and have so many slots."""

    running = Bundle("running")
    waiting = Bundle("waiting")
    workers = Bundle("workers")

    def __init__(self) -> None:
        super().__init__()
        self.queue: Queue[Request] = Queue()
        self.known: list[Worker] = []
        self.left: list[Request] = []
        self.at: dict[Request, Worker] = {}
        self.number = 0

    def find(self, one: Request) -> Worker | None:
        free = [w for w in self.known if w.fits(one) and w.at < w.slots]
        chosen = min(free, key=lambda w: w.at, default=None)
        if chosen is not None:
            chosen.at += 1
            self.at[one] = chosen
        return chosen

    def serve(self) -> None:
        for one, worker in self.queue.serve(self.find):
            earlier = [other for other in self.left if other.rank < one.rank]
            assert not any(worker.fits(other) for other in earlier), "it jumped the queue"
            self.left.remove(one)

    @rule(target=waiting, model=models, node=st.sampled_from(["", "n1", "n2"]),
          priority=st.integers(-1, 1))  # fmt: skip
    def come(self, model: str, node: str, priority: int) -> Request:
        self.number += 1
        one = Request(Rank(priority, self.number), model, node)
        if self.find(one) is None:
            self.queue.join(one)
            self.left.append(one)
        return one

    @rule(one=consumes(waiting))
    def end(self, one: Request) -> None:
        """Leave, from the queue or from the worker."""
        self.queue.leave(one)
        if one in self.left:
            self.left.remove(one)
        elif (worker := self.at.pop(one, None)) is not None:
            worker.at -= 1
            self.serve()

    @rule(target=workers, model=models, node=nodes, slots=st.integers(1, 3))
    def start(self, model: str, node: str, slots: int) -> Worker:
        worker = Worker(model, node, slots)
        self.known.append(worker)
        self.serve()
        return worker

    @rule(worker=consumes(workers))
    def drain(self, worker: Worker) -> None:
        worker.is_there = False

    @invariant()
    def nobody_waits_for_what_is_free(self) -> None:
        for one in self.left:
            assert not any(w.fits(one) and w.at < w.slots for w in self.known)

    @invariant()
    def no_worker_has_more_than_it_can_do(self) -> None:
        assert all(worker.at <= worker.slots for worker in self.known)

    @invariant()
    def positions_are_those_of_the_order(self) -> None:
        order = sorted(self.left, key=lambda one: one.rank)
        before: Counter[Any] = Counter()
        expected = []
        for one in order:
            expected.append((one, before[one.model]))
            before[one.model] += 1
        assert list(self.queue.positions()) == expected
        assert len(self.queue) == len(order)
        assert all(self.queue.count(model) == before[model] for model in "ab")


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
