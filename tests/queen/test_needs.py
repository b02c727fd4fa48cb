"""What a worker would take is counted from the model on this machine's disk, if it is there."""

from __future__ import annotations

from rbee.home import Home
from rbee.models.catalog import GGUF, Catalog, Entry, File
from rbee.models.inspect import inspect_model
from rbee.models.memory import plan_memory
from rbee.queen.needs import counting, memory_needed
from rbee.testing.tiny_model import write_tiny_model
from rbee.wire.messages import StartWorker

REQUEST = StartWorker("pypi:tiny")


def save(home: Home, name: str, dtype: str = "") -> None:
    found = inspect_model(write_tiny_model(home.models / name))
    files = tuple(File(one, size) for one, size in found.files)
    Catalog(home.models).save(name, Entry(f"pypi:{name}", "pypi", "1", files, dtype or found.dtype))


async def test_it_is_what_the_hive_here_would_count(home: Home) -> None:
    save(home, "tiny")
    place = Catalog(home.models).read("tiny")
    plan = plan_memory(place, REQUEST)
    assert memory_needed(home, REQUEST, {"an-alias", "pypi:tiny"}) == plan.required
    assert memory_needed(home, REQUEST, {place.directory.as_uri()}) == plan.required
    needed = counting(home, lambda name: {name})
    assert await needed(REQUEST) == plan.required
    cards = StartWorker("pypi:tiny", backend="cuda", device="0,1")
    assert memory_needed(home, cards, {"pypi:tiny"}) == 2 * plan_memory(place, cards).required


def test_what_cannot_be_counted_is_not_known(home: Home) -> None:
    save(home, "tiny")
    save(home, "torn")
    save(home, "other", dtype=GGUF)  # what it will be dequantised to is not there yet
    (home.models / "torn" / "config.json").write_text("{")
    for name in ("pypi:torn", "pypi:other", "pypi:nowhere", "file:///nowhere", "words"):
        assert memory_needed(home, REQUEST, {name}) is None
    assert memory_needed(home, StartWorker("m", max_model_len=1), {"pypi:tiny"}) is None
