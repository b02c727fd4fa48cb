"""Which node is to run a model: the order, the reasons, and what is never chosen."""

from __future__ import annotations

import random
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.errors import InsufficientError, NotFoundError, UnavailableError
from rbee.model import WorkerState
from rbee.queen.candidates import Candidate, NodeView, Rank, none_of, rank
from rbee.queen.placement import fits
from rbee.wire.messages import Device, StartWorker, TaskRequest, WorkerInfo

GIB = 1 << 30
REQUEST = TaskRequest("words")
WORKER = WorkerInfo("worker-1", "words", "ready")
GPU = Device("cuda", 0, "a GPU", 80 * GIB, 70 * GIB)


def best(request: TaskRequest | StartWorker, nodes: list[NodeView], **more: Any) -> Candidate:
    """Return the node to try first, or raise what a request that none can run ends with."""
    found = rank(request, nodes, **more)
    if not found.candidates:
        raise none_of(request.node, found.rejected)
    return found.candidates[0]


def view(name: str, **more: Any) -> NodeView:
    workers = tuple(attrs.evolve(one, node=name) for one in more.pop("workers", ()))
    return NodeView(name, workers=workers, **more)


COLD = view("cold", memory_free=16 * GIB)
DISK = view("disk", models=frozenset({"words"}), memory_free=16 * GIB)
COMING = view("coming", workers=[attrs.evolve(WORKER, state="loading")])
WARM = view("warm", workers=[attrs.evolve(WORKER, running=5)])
FULL = view("full", memory_free=GIB)
FULL_DISK = attrs.evolve(DISK, name="full-disk", memory_free=GIB)
BEST_FIRST = [WARM, COMING, DISK, COLD, FULL_DISK, FULL]

workers = st.builds(
    WorkerInfo,
    worker_id=st.uuids().map(str),
    model=st.sampled_from(["words", "other"]),
    state=st.sampled_from([state.value for state in WorkerState]),
    backend=st.sampled_from(["cpu", "cuda"]),
    running=st.integers(0, 9),
)
sizes = st.none() | st.integers(0, 100 * GIB)
devices = st.builds(
    Device, st.sampled_from(["cpu", "cuda"]), st.integers(0, 2), st.just("d"),
    st.just(80 * GIB), st.integers(0, 80 * GIB),
)  # fmt: skip
names = st.sampled_from(["a", "b", "localhost", "z"])
views = st.builds(
    view,
    names,
    state=st.sampled_from(["ready", "unreachable", "fenced"]),
    doubt=st.sampled_from(["", "it was unreachable"]),
    engines=st.sampled_from([None, frozenset({"vllm", "echo"}), frozenset({"echo"})]),
    workers=st.lists(workers, max_size=3),
    models=st.frozensets(st.sampled_from(["words", "other"])),
    memory_total=sizes,
    memory_free=sizes,
    devices=st.lists(devices, max_size=3).map(tuple),
)
clusters = st.lists(views, max_size=4, unique_by=lambda node: node.name)
requests = st.builds(
    TaskRequest,
    model=st.sampled_from(["words", "other", "third", "/a/path"]),
    node=st.none() | names,
    backend=st.sampled_from([None, "cpu", "cuda"]),
    device=st.sampled_from([None, "0", "0,1"]),
)


@given(requests, clusters, sizes, st.randoms())
def test_the_order_depends_on_nothing_but_what_is_known(
    request: TaskRequest, nodes: list[NodeView], needed: int | None, chance: random.Random
) -> None:
    found = rank(request, nodes, needed=needed)
    chance.shuffle(nodes)
    assert rank(request, nodes, needed=needed) == found


@given(requests, clusters, sizes)
def test_every_node_is_a_candidate_or_rejected_with_a_reason(
    request: TaskRequest, nodes: list[NodeView], needed: int | None
) -> None:
    found = rank(request, nodes, needed=needed)
    told = [one.node for one in (*found.candidates, *found.rejected)]
    assert sorted(told) == sorted(node.name for node in nodes)
    assert all(one.why for one in (*found.candidates, *found.rejected))
    assert len(found.explain()) == len(nodes)


@given(requests, clusters, sizes)
def test_a_candidate_is_ready_and_what_was_asked_for(
    request: TaskRequest, nodes: list[NodeView], needed: int | None
) -> None:
    by_name = {node.name: node for node in nodes}
    for one in rank(request, nodes, needed=needed).candidates:
        assert by_name[one.node].state == "ready"
        assert request.node in (None, one.node)


@given(requests, clusters, sizes)
def test_better_ranks_come_first_then_this_machine_then_the_less_busy_then_the_name(
    request: TaskRequest, nodes: list[NodeView], needed: int | None
) -> None:
    load = {node.name: node.load for node in nodes}
    keys = [
        (one.rank, one.node != "localhost", load[one.node], one.node)
        for one in rank(request, nodes, needed=needed).candidates
    ]
    assert keys == sorted(keys)


@given(requests, clusters, sizes)
def test_a_ready_worker_that_fits_is_never_passed_over(
    request: TaskRequest, nodes: list[NodeView], needed: int | None
) -> None:
    found = rank(request, nodes, needed=needed)
    warm = {
        node.name
        for node in nodes
        if node.name in {one.node for one in found.candidates}
        and not node.doubt
        and any(fits(one, request) and one.state == "ready" for one in node.workers)
    }
    assert {one.node for one in found.candidates if one.rank is Rank.WARM} == warm


@given(requests, clusters, sizes)
def test_the_best_is_the_first_or_an_error_that_names_every_reason(
    request: TaskRequest, nodes: list[NodeView], needed: int | None
) -> None:
    found = rank(request, nodes, needed=needed)
    if found.candidates:
        assert best(request, nodes, needed=needed) == found.candidates[0]
        return
    with pytest.raises((NotFoundError, UnavailableError, InsufficientError)) as caught:
        best(request, nodes, needed=needed)
    is_known = request.node in {None, *(node.name for node in nodes)}
    assert isinstance(caught.value, NotFoundError) is not is_known
    assert caught.value.hint
    if is_known:
        assert caught.value.details["why"] == {one.node: one.why for one in found.rejected}


def test_warm_comes_before_on_disk_before_room_before_full() -> None:
    found = rank(REQUEST, BEST_FIRST[::-1], needed=4 * GIB)
    assert [one.node for one in found.candidates] == [node.name for node in BEST_FIRST]
    assert [one.rank for one in found.candidates] == list(Rank)[:-1]
    assert best(REQUEST, BEST_FIRST, needed=4 * GIB).why == "worker-1 has the model loaded"


def test_an_order_for_a_worker_is_placed_as_a_request_is() -> None:
    order = StartWorker("words")
    assert rank(order, BEST_FIRST) == rank(REQUEST, BEST_FIRST)


def test_a_model_is_known_on_disk_by_any_of_its_names() -> None:
    found = rank(TaskRequest("alias"), [COLD, DISK], meanings=lambda name: {name, "words"})
    assert found.candidates[0].node == "disk"


def test_memory_that_nobody_knows_is_no_reason_against_a_node() -> None:
    dark = attrs.evolve(DISK, memory_free=None)
    assert best(REQUEST, [COLD, dark], needed=4 * GIB).node == dark.name
    assert best(REQUEST, [COLD, DISK]).node == "disk"


def test_equals_are_taken_by_load_then_name() -> None:
    busy = attrs.evolve(WORKER, model="other", running=3)
    nodes = [view("a", workers=[busy]), view("c"), view("b")]
    assert [one.node for one in rank(REQUEST, nodes).candidates] == ["b", "c", "a"]


def test_of_equals_this_machine_is_taken_however_busy() -> None:
    here = view("localhost", workers=[attrs.evolve(WORKER, model="other", running=9)])
    assert best(REQUEST, [view("a"), here]).node == "localhost"
    assert best(REQUEST, [DISK, here]).node == "disk"


def test_a_node_in_doubt_comes_after_all_others() -> None:
    doubted = attrs.evolve(WARM, doubt="unreachable a while ago")
    found = rank(REQUEST, [doubted, FULL], needed=4 * GIB).candidates
    assert [one.node for one in found] == ["full", "warm"]
    assert found[-1].why == "tried after all others: unreachable a while ago"
    assert best(REQUEST, [doubted]).node == "warm"


def test_a_node_without_the_engine_is_not_taken() -> None:
    bare = attrs.evolve(COLD, engines=frozenset({"echo"}))
    with pytest.raises(UnavailableError, match=r"no engine vllm \(it has echo\)"):
        best(REQUEST, [bare])
    assert best(attrs.evolve(REQUEST, engine="echo"), [bare])


def test_a_path_is_one_of_this_machine_unless_a_node_is_named() -> None:
    path = attrs.evolve(REQUEST, model="file:///models/a")
    here = view("localhost", memory_free=GIB)
    found = rank(path, [here, COLD], needed=4 * GIB)
    assert [(one.node, one.rank) for one in found.candidates] == [("localhost", Rank.FULL_ON_DISK)]
    assert found.rejected[0].why == "a path is one of localhost, unless a node is named"
    assert best(attrs.evolve(path, node="cold"), [here, COLD]).node == "cold"
    both = {"alias", "/models/a", "pypi:a"}  # the second source can be had anywhere
    assert len(rank(REQUEST, [here, COLD], meanings=lambda name: both).candidates) == 2


def test_what_cannot_ever_fit_is_rejected_by_size() -> None:
    small = attrs.evolve(COLD, memory_total=2 * GIB)
    with pytest.raises(InsufficientError, match=r"needs 4\.0 GiB of memory, has 2\.0 GiB"):
        best(REQUEST, [small], needed=4 * GIB)
    assert best(REQUEST, [attrs.evolve(small, workers=WARM.workers)], needed=4 * GIB)  # it does


def test_a_gpu_that_is_not_there_is_never_replaced() -> None:
    request = attrs.evolve(REQUEST, backend="cuda", device="0,1")
    with pytest.raises(UnavailableError, match=r"no cuda device 1 \(it has 0\)"):
        best(request, [view("g", devices=(GPU,))])
    with pytest.raises(UnavailableError, match=r"no cuda device 0, 1 \(it has none\)"):
        best(request, [view("g", devices=(attrs.evolve(GPU, backend="cpu"),))])
    assert best(request, [view("g")]).node == "g"  # its devices are not known yet


def test_a_gpus_own_memory_counts() -> None:
    request = attrs.evolve(REQUEST, backend="cuda")
    node = view("g", devices=(GPU,), memory_total=GIB, memory_free=0)
    assert best(request, [node], needed=60 * GIB).rank is Rank.ROOM
    assert best(request, [node], needed=75 * GIB).rank is Rank.FULL


def test_a_node_asked_for_by_name_is_taken_or_told_of() -> None:
    down = NodeView("mac", "unreachable", "connection refused")
    asked = attrs.evolve(REQUEST, node="mac")
    with pytest.raises(UnavailableError, match="node mac cannot run it: unreachable: connection"):
        best(asked, [WARM, down])
    with pytest.raises(NotFoundError, match="no node 'mac'; known: cold, warm"):
        best(asked, [WARM, COLD])
    assert best(attrs.evolve(REQUEST, node="cold"), [WARM, COLD]).node == "cold"


def test_without_any_usable_node_each_ones_reason_is_told() -> None:
    nodes = [NodeView("a", "unreachable", "no route"), NodeView("b", "fenced")]
    with pytest.raises(UnavailableError) as caught:
        best(REQUEST, nodes)
    assert caught.value.message == "no node can run it: a: unreachable: no route; b: fenced"
    with pytest.raises(UnavailableError, match="there are none"):
        best(REQUEST, [])
