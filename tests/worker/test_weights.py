"""The share of loaded weights, counted where they are read and told through a file."""

import json
import struct
from types import SimpleNamespace

import pytest
import trio

from rbee.worker import weights
from rbee.worker.vllm_engine import LOOK, STARTING, Steps


@pytest.fixture
def every_write(monkeypatch):
    monkeypatch.setattr(weights, "OFTEN", 0.0)


def tensors(*sizes):
    return [(f"t{i}", SimpleNamespace(nbytes=size)) for i, size in enumerate(sizes)]


def test_the_share_grows_with_the_bytes_that_were_taken(tmp_path, every_write):
    file = tmp_path / "weights"
    assert weights.read_share(file) is None
    taken = weights.counted(tensors(10, 30, 60), 110, file)
    seen = [weights.read_share(file) for _ in taken]
    assert seen == [0.0, 10 / 110, 40 / 110]
    assert weights.read_share(file) == 1.0


def test_more_bytes_than_files_are_all_of_them(tmp_path, every_write):
    file = tmp_path / "weights"
    taken = weights.counted(tensors(10, 30), 5, file)
    assert [next(taken), next(taken)] == tensors(10, 30)
    assert weights.read_share(file) == 1.0


def test_what_is_wrong_with_the_file_stops_no_loading(tmp_path):
    assert list(weights.counted(tensors(1, 2), 3, tmp_path / "gone" / "weights")) == tensors(1, 2)


@pytest.mark.parametrize("content", [b"", b"half", struct.pack("dd", 1.0, 1.0)])
def test_a_file_of_another_size_tells_nothing(tmp_path, content):
    (tmp_path / "weights").write_bytes(content)
    assert weights.read_share(tmp_path / "weights") is None


def test_the_size_is_that_of_the_files_in_the_index(tmp_path):
    for name, size in (("a.safetensors", 3), ("b.safetensors", 4), ("all.safetensors", 7)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert weights.weights_size(tmp_path) == 14
    index = {"weight_map": {"t0": "a.safetensors", "t1": "b.safetensors", "t2": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights.weights_size(tmp_path) == 7


@pytest.mark.parametrize(("size", "share"), [(0, None), (1, 1.0)])
def test_only_safetensors_are_counted(tmp_path, monkeypatch, size, share):
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "weights"))
    (tmp_path / ("model.safetensors" if size else "model.bin")).write_bytes(b"x")
    counting = weights._counting(lambda loader, config, model: tensors(1))
    assert list(counting(None, SimpleNamespace(model=str(tmp_path)), "model")) == tensors(1)
    assert weights.read_share(tmp_path / "weights") == share


class Loading:
    """An `rbee.aio.AioTask` that ends when it is told."""

    def __init__(self):
        self.done = trio.Event()
        self.closed = False

    async def wait(self):
        await self.done.wait()
        return "loaded"

    async def aclose(self):
        self.closed = True


async def test_the_weights_are_followed_only_while_the_engine_starts(tmp_path, autojump_clock):
    told, loading = [], Loading()
    steps = Steps(lambda text, share=None: told.append((text, share)), tmp_path / "weights")

    async def load():
        for text, share in (("config", 0.1), (STARTING, 0.4), ("building the API", 0.7)):
            steps.tell(text)
            weights.write_share(tmp_path / "weights", share)
            await trio.sleep(1.25 * LOOK)  # one look at each
        loading.done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(load)
        assert await steps.follow(loading) == "loaded"
    assert told == [
        ("config", None),
        (STARTING, None),
        ("weights", 0.4),
        ("building the API", None),
    ]
    assert loading.closed


async def test_after_the_weights_comes_the_cache(tmp_path, autojump_clock):
    told, loading = [], Loading()
    steps = Steps(lambda text, share=None: told.append((text, share)), tmp_path / "weights")
    steps.tell(STARTING)
    weights.write_share(tmp_path / "weights", 1.0)
    with trio.move_on_after(2.5 * LOOK):
        await steps.follow(loading)
    assert told[1:] == [("weights", 1.0), ("KV cache", None)]
    assert loading.closed


@pytest.mark.parametrize(
    ("parent", "nonce", "counts"),
    [(None, "n", False), (object(), "", False), (object(), "n", True)],
)
def test_only_processes_spawned_by_a_worker_count_by_themselves(monkeypatch, parent, nonce, counts):
    calls = []
    monkeypatch.setenv("RBEE_NONCE", nonce)
    monkeypatch.setattr(weights.multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(weights, "count_weights", lambda: calls.append(1))
    weights.register()
    assert bool(calls) == counts
