"""What is known of nodes: the newest and surest of it counts, and nothing there is trusted."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee.errors import MachineError, UnavailableError
from rbee.home import Home
from rbee.models.catalog import Catalog, Entry, File
from rbee.nodes.node import Node, NodeName, NodeStatus
from rbee.nodes.store import NodeStore
from rbee.queen.attempts import Attempts
from rbee.queen.views import AVOIDED, Known, Own, Views, node_view, own_view
from rbee.wire import codec
from rbee.wire.messages import Device, Heartbeat, HiveInfo, WorkerInfo

CPU = Device("cpu", 0, "a CPU", 64, 32)
GPU = Device("cuda", 0, "a GPU", 80, 70)
NODE = Node(
    NodeName("mac"),
    status=NodeStatus.READY,
    capabilities={
        "devices": [codec.to_dict(CPU), codec.to_dict(GPU)],
        "engines": {"vllm": "1.0", "echo": None},
        "models": ["pypi:old"],
    },
)
BEAT = Heartbeat("hive-1", 60, 20, 5, models=("pypi:new",), devices=(CPU,))
DOWN = attrs.evolve(NODE, status=NodeStatus.UNREACHABLE, last_error="no route to host")

seconds = st.floats(0, 100)
knowns = st.builds(
    Known,
    hive=st.sampled_from(["", "ready", "unresponsive", "stopping"]),
    beat=st.sampled_from([None, BEAT]),
    silent=st.none() | seconds,
    fenced=st.just(0.0) | seconds,
    failed=st.none() | seconds,
    why=st.just("it is off"),
)
nodes = st.sampled_from([NODE, DOWN, attrs.evolve(NODE, status=NodeStatus.UNKNOWN)])


@given(nodes, knowns)
@settings(max_examples=50)
def test_a_node_is_usable_doubted_or_out_and_says_why(node: Node, known: Known) -> None:
    view = node_view(node, known)
    if known.hive == "ready":
        assert (view.state, view.doubt) == ("ready", "")
    if view.state != "ready":
        assert not known.hive
        assert view.reason
    if known.hive or known.silent is not None:
        assert view.state == "ready"  # what runs, or is being tried, tells more than the past
    elif known.fenced:
        assert view.state == "fenced"
    elif known.failed is not None:
        assert (view.state == "ready") is (known.failed >= AVOIDED)
        assert bool(view.doubt) is (view.state == "ready")


@pytest.mark.parametrize("told", [None, 7, "x", [], {}, [7], [None], [{"index": "x"}], {"x": []}])
def test_capabilities_of_any_shape_are_taken(told: Any) -> None:
    capabilities = dict.fromkeys(["devices", "engines", "models"], told)
    view = node_view(attrs.evolve(NODE, capabilities=capabilities), Known())
    assert (view.name, view.devices) == ("mac", ())


def test_a_hives_news_are_believed_before_the_registry() -> None:
    view = node_view(NODE, Known(hive="ready", beat=BEAT, workers=(WorkerInfo("w", "m", "ready"),)))
    assert (view.models, view.devices) == (frozenset({"pypi:new"}), (CPU,))
    assert (view.memory_total, view.memory_free, len(view.workers)) == (60, 20, 1)
    assert view.engines == {"vllm"}
    view = node_view(NODE, Known())
    assert (view.models, view.devices) == (frozenset({"pypi:old"}), (CPU, GPU))
    assert (view.memory_total, view.memory_free) == (64, 32)
    early = attrs.evolve(BEAT, models=None, devices=())  # it has not looked yet
    view = node_view(NODE, Known(beat=early))
    assert (view.models, view.devices) == (frozenset({"pypi:old"}), (CPU, GPU))


def test_what_was_wrong_long_ago_is_a_doubt_and_what_is_wrong_now_a_reason() -> None:
    assert node_view(DOWN, Known()).doubt == "no route to host"
    view = node_view(DOWN, Known(failed=4.0, why="refused"))
    assert (view.state, view.reason) == ("failed 4 s ago", "refused")
    assert node_view(NODE, Known(failed=AVOIDED, why="refused")).doubt == "refused"
    view = node_view(NODE, Known(fenced=7.0))
    assert view.reason == "for 7 s something of its lost hive may still run there"
    assert node_view(DOWN, Known(silent=0.0)).doubt == ""
    assert node_view(NODE, Known(silent=5.0)).doubt == "no answer for 5 s"
    assert node_view(NODE, Known(hive="stopping")).doubt == "its hive is being stopped"
    assert own_view(Own(), Known(hive="unresponsive")).doubt == "its hive does not answer"
    assert own_view(Own(), Known(failed=1.0, why="the disk is full")).doubt == "the disk is full"


INFO = HiveInfo("mac", "hive-1", "", "ready", "queen-1", 7, "0")


# the look at all of them --------------------------------------------------------------------------
@attrs.define(eq=False)
class FakeHives:
    """What is looked at of a queen's hives."""

    info: HiveInfo = INFO
    heard: float = 0.0
    workers: list[WorkerInfo] = attrs.field(
        factory=lambda: [WorkerInfo("worker-1", "m", "ready", node="mac")]
    )
    beats: dict[str, Heartbeat] = attrs.field(factory=lambda: {"mac": BEAT})

    def running(self, node: str) -> Any:
        return self if node == "mac" else None


def make_views(home: Home, attempts: Attempts) -> Views:
    hives: Any = FakeHives()
    return Views(home, hives, attempts, NodeStore.of(home), lambda name: 9.0 * (name == "pi"))


async def fail(node: str, narrate: Any) -> Any:
    raise UnavailableError("refused")


async def test_this_machine_and_every_registered_node_are_looked_at(home: Home) -> None:
    views = make_views(home, Attempts(fail))
    (home.models / "a").mkdir()
    (home.models / "a" / "f").write_text("ab")
    Catalog(home.models).save("a", Entry("pypi:a", "pypi", "1", (File("f", 2),), "float32"))
    (here,) = await views.look()
    assert (here.name, here.models) == ("localhost", {"pypi:a"})
    assert 0 < (here.memory_free or 0) < (here.memory_total or 0)
    assert here.devices[0].backend == "cpu"
    for name in ("mac", "pi"):
        await NodeStore.of(home).add(attrs.evolve(NODE, name=NodeName(name)))
    _, mac, pi = await views.look()
    assert (mac.name, mac.state, [one.worker_id for one in mac.workers]) == (
        "mac", "ready", ["worker-1"],
    )  # fmt: skip
    assert (pi.name, pi.state, pi.workers) == ("pi", "fenced", ())


async def test_a_failure_is_forgotten_once_somebody_has_seen_the_node_well(home: Home) -> None:
    attempts = Attempts(fail)
    views = make_views(home, attempts)
    store = NodeStore.of(home)
    await store.add(attrs.evolve(NODE, name=NodeName("linux")))
    async with attempts.open():
        with pytest.raises(UnavailableError):
            await attempts.get("linux", print)
        assert (await views.look())[1].state == "failed 0 s ago"
        await store.note_ready("linux")  # `node check`, say
        assert (await views.look())[1].state == "ready"


async def test_a_hive_that_failed_us_is_doubted_until_it_is_heard_again(home: Home) -> None:
    attempts = Attempts(fail)
    views = make_views(home, attempts)
    await NodeStore.of(home).add(NODE)
    attempts.note_failure("mac", UnavailableError("no answer"))
    assert (await views.look())[1].doubt == "its hive does not answer"
    views._hives.heard = trio.current_time() + 1  # type: ignore[attr-defined]
    assert (await views.look())[1].doubt == ""


async def test_a_registry_that_cannot_be_read_leaves_this_machine(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def damaged(self: NodeStore) -> list[Node]:
        raise MachineError("queen.db is damaged")

    monkeypatch.setattr(NodeStore, "all", damaged)
    assert [view.name for view in await make_views(home, Attempts(fail)).look()] == ["localhost"]


async def test_a_disk_that_does_not_answer_leaves_all_nodes(
    home: Home, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    async def hang(*args: object, **more: object) -> None:
        await trio.sleep_forever()

    async def nodes(self: NodeStore) -> list[Node]:
        return [NODE]

    monkeypatch.setattr(trio.to_thread, "run_sync", hang)
    monkeypatch.setattr(NodeStore, "all", nodes)
    here, mac = await make_views(home, Attempts(fail)).look()
    assert (here.memory_free, here.models, mac.name) == (None, frozenset(), "mac")
