"""Where a worker is started: the node that is asked for, or the best one that can be reached."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import attrs
import pytest
import trio

from rbee.errors import ConflictError, NotFoundError, PeerError, RbeeError, UnavailableError
from rbee.queen.attempts import Attempts
from rbee.queen.candidates import NodeView
from rbee.queen.places import Places
from rbee.wire.messages import HiveInfo, Narration, StartWorker, WorkerInfo
from tests.queen.test_attempts import DOWN, FakeNodes

GIB = 1 << 30
REQUEST = StartWorker("words", engine="echo")
MAC = NodeView("mac", models=frozenset({"words"}), memory_free=16 * GIB, memory_total=32 * GIB)
HERE = NodeView("localhost", memory_free=8 * GIB, memory_total=16 * GIB)
LINUX = NodeView("linux", memory_free=8 * GIB, memory_total=16 * GIB)


@attrs.frozen
class FakeHive:
    """A hive that turns out to have ended when it is asked whether it ends."""

    info: HiveInfo
    refusals: dict[str, RbeeError]
    is_lost: bool

    async def ends(self) -> bool:
        await trio.lowlevel.checkpoint()
        if self.is_lost:
            self.refusals.clear()
        return self.is_lost


@attrs.define(eq=False)
class Cluster(FakeNodes):
    """Nodes, what is known of them, and where workers were begun.

    ``refusals``: what hives answer to a start; those that are ``lost`` give none when started anew.
    """

    views: list[NodeView] = attrs.field(factory=lambda: [HERE, LINUX, MAC])
    needed: int | None = None
    refusals: dict[str, RbeeError] = attrs.field(factory=dict)
    lost: bool = False
    begun: list[str] = attrs.field(factory=list)
    told: list[str] = attrs.field(factory=list)
    places: Places = attrs.field(init=False)

    async def get(self, node: str, narrate: Any) -> Any:
        await FakeNodes.get(self, node, narrate)
        info = HiveInfo(node, "hive-1", "", "ready", "queen-1", 7, "0")
        return FakeHive(info, self.refusals, self.lost)

    async def look(self) -> list[NodeView]:
        await trio.lowlevel.checkpoint()
        return self.views

    async def count(self, request: StartWorker) -> int | None:
        await trio.lowlevel.checkpoint()
        return self.needed

    async def begin(self, hive: Any) -> WorkerInfo:
        await trio.lowlevel.checkpoint()
        node = hive.info.node
        self.begun.append(node)
        if node in self.refusals:
            raise self.refusals[node]
        return WorkerInfo("worker-1", "words", "started", node=node)

    def narrate(self, narration: Narration) -> None:
        self.told.append(f"{narration.action} {narration.text}")

    async def start(self, node: str | None = None) -> str:
        request = attrs.evolve(REQUEST, node=node)
        return (await self.places.start(request, self.narrate, self.begin)).node


@asynccontextmanager
async def open_cluster(**given: Any) -> AsyncGenerator[Cluster]:
    cluster = Cluster(**given)
    attempts = Attempts(cluster.get)
    cluster.places = Places(cluster.look, attempts, cluster.count)
    async with attempts.open():
        yield cluster


@contextmanager
def refused(**reasons: str) -> Iterator[None]:
    """Expect the error that no node can run it, with the reason of each."""
    with pytest.raises(UnavailableError, match="no node can run it") as caught:
        yield
    assert caught.value.details["why"] == reasons
    assert (caught.value.http_status, caught.value.hint) == (503, "rbee-keeper node list")
    assert all(f"{node}: {why}" in caught.value.message for node, why in reasons.items())


async def test_the_best_node_is_taken_and_no_other_touched() -> None:
    async with open_cluster() as cluster:
        assert await cluster.start() == "mac"
        assert [node for _, node in cluster.tried] == ["mac"]


async def test_what_a_worker_takes_decides_where_memory_is_short() -> None:
    async with open_cluster(views=[attrs.evolve(HERE, memory_free=GIB), LINUX]) as cluster:
        assert await cluster.start() == "localhost"
        cluster.needed = 4 * GIB
        assert await cluster.start() == "linux"


async def test_a_node_that_is_not_reached_is_told_of_and_the_next_taken() -> None:
    async with open_cluster(errors={"mac": DOWN}) as cluster:
        assert await cluster.start() == "localhost"
        assert cluster.told == ["skip mac: connection refused; trying localhost"]


async def test_when_no_node_is_left_the_error_has_the_reason_of_each() -> None:
    fenced = attrs.evolve(LINUX, state="fenced", reason="for 9 s")
    async with open_cluster(
        views=[HERE, fenced, MAC],
        errors={"mac": DOWN, "localhost": ConflictError("no room for a hive")},
    ) as cluster:
        why = {"mac": "connection refused", "localhost": "no room for a hive"}
        with refused(linux="fenced: for 9 s", **why):
            await cluster.start()
        assert len(cluster.tried) == 2
        cluster.views = [fenced, attrs.evolve(MAC, state="failed 3 s ago")]
        with refused(linux="fenced: for 9 s", mac="failed 3 s ago"):
            await cluster.start()


async def test_a_node_that_is_asked_for_is_never_replaced() -> None:
    async with open_cluster(
        errors={"linux": DOWN, "mars": NotFoundError("no node 'mars'")}
    ) as cluster:
        with pytest.raises(UnavailableError, match="connection refused"):
            await cluster.start("linux")
        with pytest.raises(NotFoundError, match="mars"):
            await cluster.start("mars")
        cluster.errors.clear()
        assert await cluster.start("linux") == "linux"  # also right after a failure
        assert {node for _, node in cluster.tried} == {"linux", "mars"}


async def test_a_hive_that_goes_when_it_is_asked_is_replaced() -> None:
    gone = UnavailableError("hive on mac did not answer")
    async with open_cluster(refusals={"mac": gone}) as cluster:
        assert await cluster.start() == "localhost"
        assert cluster.begun == ["mac", "localhost"]
        cluster.refusals = {"localhost": gone, "mac": gone, "linux": gone}
        with refused(**dict.fromkeys(["mac", "localhost", "linux"], str(gone))):
            await cluster.start()
        cluster.refusals = {"mac": ConflictError("no lease")}
        with pytest.raises(ConflictError):  # it has an answer, which is no
            await cluster.start()


@pytest.mark.parametrize("node", [None, "mac"])
@pytest.mark.parametrize("error", [DOWN, PeerError("it broke the connection")])
async def test_a_hive_that_has_ended_without_a_word_yet_is_started_anew(
    node: str | None, error: RbeeError
) -> None:
    async with open_cluster(refusals={"mac": error}, lost=True) as cluster:
        assert await cluster.start(node) == "mac"
        assert cluster.begun == ["mac", "mac"]
        assert [node for _, node in cluster.tried] == ["mac", "mac"]


async def test_a_hive_that_breaks_off_and_lives_is_not_asked_again() -> None:
    async with open_cluster(refusals={"mac": PeerError("half an answer")}) as cluster:
        with pytest.raises(PeerError, match="half an answer"):
            await cluster.start("mac")
        assert cluster.begun == ["mac"]


async def test_the_only_node_there_is_says_itself_what_is_wrong() -> None:
    no_gpu = attrs.evolve(HERE, engines=frozenset())
    async with open_cluster(views=[no_gpu], errors={"localhost": DOWN}) as cluster:
        with pytest.raises(UnavailableError, match=r"^connection refused$"):
            await cluster.start()


async def test_a_node_in_doubt_that_were_best_is_looked_at_for_the_next_one(
    autojump_clock: trio.abc.Clock,
) -> None:
    doubted = attrs.evolve(MAC, doubt="was unreachable")
    async with open_cluster(views=[HERE, doubted], seconds={"mac": 50}) as cluster:
        assert await cluster.start() == "localhost"
        assert trio.current_time() == cluster.began  # this one did not wait
        assert sorted(node for _, node in cluster.tried) == ["localhost", "mac"]
        cluster.views = [HERE, attrs.evolve(LINUX, doubt="was unreachable")]
        assert await cluster.start() == "localhost"
        assert "linux" not in {node for _, node in cluster.tried}  # no better anyway


async def test_explaining_starts_nothing() -> None:
    async with open_cluster(needed=4 * GIB) as cluster:
        found = await cluster.places.explain(REQUEST)
        assert [(one.node, one.suits) for one in found] == [
            ("mac", "on_disk"), ("localhost", "room"), ("linux", "room"),
        ]  # fmt: skip
        assert found[0].why == "the model is on its disk; needs 4.0 GiB of memory, 16.0 GiB free"
        asked = await cluster.places.explain(attrs.evolve(REQUEST, node="linux"))
        assert [(one.node, one.suits) for one in asked] == [
            ("linux", "room"), ("localhost", "no"), ("mac", "no"),
        ]  # fmt: skip
        with pytest.raises(NotFoundError, match="no node 'mars'; known: linux, localhost, mac"):
            await cluster.places.explain(attrs.evolve(REQUEST, node="mars"))
        assert cluster.tried == []
