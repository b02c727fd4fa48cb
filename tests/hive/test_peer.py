"""What a hive hears from a worker over HTTP, on a real worker with the echo engine."""

from contextlib import suppress
from functools import partial

import attrs
import pytest
import trio

from rbee.errors import UnauthorizedError, UnavailableError
from rbee.hive.peer import HttpPeer, connect_with
from rbee.model import WorkerConfig, WorkerId, WorkerSpec
from rbee.wire.messages import WorkerInfo
from rbee.worker import daemon


@pytest.fixture
async def peer(tmp_path, nursery):
    spec = WorkerSpec(WorkerId("worker-1"), "echo", engine="echo", keep_alive=60.0)
    config = WorkerConfig(spec, str(tmp_path), "secret", port=0)
    url = await nursery.start(partial(daemon.serve, config))
    return connect_with("secret")(WorkerInfo("worker-1", "echo", "ready", url=url))


async def test_a_worker_tells_how_it_stands_and_goes_when_nobody_uses_it(peer: HttpPeer) -> None:
    with trio.fail_after(10):
        state = await peer.state()
        assert state is not None
        assert (state.worker_id, state.running, state.keep_alive) == ("worker-1", 0, 60)
        assert await peer.stop_if_idle()
        while await peer.state() is not None:  # noqa: ASYNC110  # until it has gone
            await trio.sleep(0.02)


@pytest.mark.parametrize(
    "change",
    [{"token": "wrong"}, {"worker_id": "worker-0"}, {"url": "http://127.0.0.1:1"}],
)
async def test_one_that_is_not_the_one_that_was_meant_does_not_answer(
    peer: HttpPeer, change: dict[str, str]
) -> None:
    other = attrs.evolve(peer, **change)
    assert await other.state() is None
    with suppress(UnauthorizedError, UnavailableError):  # nobody knows what he would have done
        assert not await other.stop_if_idle()
    assert await peer.state() is not None
