"""Which worker takes a job: what the request does not name is free."""

from __future__ import annotations

from functools import partial

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.model import WorkerState
from rbee.models.reference import meanings
from rbee.queen.placement import choose, fits, start_for
from rbee.wire.messages import TaskRequest, WorkerInfo

READY = WorkerInfo(
    "worker-1", "pypi:words", WorkerState.READY.value, served_names=("words",), node="n1",
    backend="cuda", device="1",
)  # fmt: skip
REQUEST = TaskRequest("words")
USABLE = {"started", "loading", "ready"}

states = st.sampled_from([state.value for state in WorkerState])
workers = st.builds(
    WorkerInfo,
    worker_id=st.uuids().map(str),
    model=st.sampled_from(["words", "other"]),
    state=states,
    engine=st.sampled_from(["vllm", "echo"]),
    node=st.sampled_from(["n1", "n2"]),
)
requests = st.builds(
    TaskRequest,
    model=st.sampled_from(["words", "other", "third"]),
    engine=st.sampled_from([None, "vllm", "echo"]),
    node=st.sampled_from([None, "n1", "n2"]),
)


@pytest.mark.parametrize(
    "wish",
    [{}, {"model": "pypi:words"}, {"node": "n1"}, {"backend": "cuda"}, {"device": "1"},
     {"engine": "vllm"}],
)  # fmt: skip
def test_a_worker_fits_what_it_is(wish: dict[str, str]) -> None:
    assert fits(READY, attrs.evolve(REQUEST, **wish))


@pytest.mark.parametrize(
    "wish",
    [{"model": "word"}, {"node": "n2"}, {"backend": "cpu"}, {"device": "0"}, {"engine": "echo"}],
)
def test_a_worker_does_not_fit_what_it_is_not(wish: dict[str, str]) -> None:
    """No silent fallback: asked for another device, it is not taken."""
    assert not fits(READY, attrs.evolve(REQUEST, **wish))


@pytest.mark.parametrize("state", list(WorkerState))
def test_only_a_worker_that_will_serve_fits(state: WorkerState) -> None:
    assert fits(attrs.evolve(READY, state=state.value), REQUEST) is (state.value in USABLE)


@given(st.lists(workers), requests)
def test_the_choice_fits_and_is_the_readiest(found: list[WorkerInfo], request: TaskRequest) -> None:
    fitting = [worker for worker in found if fits(worker, request)]
    chosen = choose(found, request)
    assert (chosen is None) is (not fitting)
    if chosen is not None:
        order = ["ready", "loading", "started"]
        assert chosen in fitting
        assert order.index(chosen.state) == min(order.index(one.state) for one in fitting)


def test_aliases_hub_id_and_reference_of_a_model_share_a_worker() -> None:
    aliases = {"a": ["hf:org/repo"], "b": ["a"], "other": ["hf:org/other"]}
    means = partial(meanings, aliases=aliases)
    found = attrs.evolve(READY, model="hf:org/repo", served_names=("hf:org/repo", "a", "org/repo"))
    on_its_way = attrs.evolve(READY, state="started", model="a", served_names=("a",))
    for worker in (found, on_its_way):
        for name in ("a", "b", "org/repo", "hf:org/repo"):
            assert fits(worker, TaskRequest(name), means), name
            longer = TaskRequest(name, max_model_len=512)
            assert not fits(worker, longer, means), name
        assert not fits(worker, TaskRequest("other"), means)
        assert not fits(worker, TaskRequest("hf:org/repo@v1"), means)


@given(requests)
def test_what_is_started_for_a_request_fits_it(request: TaskRequest) -> None:
    start = start_for(request, "queen-1")
    worker = WorkerInfo(
        "w", start.model, "started", engine=start.engine, node=start.node or "localhost",
        backend=start.backend or "cpu", device=start.device or "0", owner=start.owner,
    )  # fmt: skip
    assert fits(worker, request)
    assert worker.owner == "queen-1"
