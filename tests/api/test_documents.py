"""The OpenAPI documents say what the daemons have, and lie in docs/ as they are."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

import rbee
from rbee.api.documents import DAEMONS, document_of
from rbee.api.schema import Schemas
from rbee.hive import app as hive_app
from rbee.home import Home
from rbee.web.router import App
from rbee.worker import app as worker_app

DOCS = Path(__file__).parents[2] / "docs" / "openapi"
Routes = set[tuple[str, str]]


@pytest.mark.parametrize("daemon", DAEMONS)
def test_the_document_in_docs_is_that_of_this_version(daemon: str) -> None:
    written = json.loads((DOCS / f"{daemon}.json").read_text())
    assert written == document_of(daemon), (
        f"python -m rbee.api {daemon} > docs/openapi/{daemon}.json"
    )


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> Routes:
    """Return the set that every route of a daemon gets into that is made in this process."""
    found: Routes = set()
    add = App.add

    def note(self: App, method: str, path: str, *args: Any, **options: Any) -> None:
        found.add((method, path))
        add(self, method, path, *args, **options)

    monkeypatch.setattr(App, "add", note)
    return found


def described(daemon: str) -> Routes:
    paths = document_of(daemon)["paths"]
    return {(method.upper(), path) for path, methods in paths.items() for method in methods}


@pytest.mark.parametrize(
    ("path", "kinds"),
    [
        ("/v2/tasks", {"text/event-stream"}),
        ("/v1/chat/completions", {"application/json", "text/event-stream"}),
        ("/v1/embeddings", {"application/json"}),
    ],
)
def test_what_streams_is_said_to(path: str, kinds: set[str]) -> None:
    answers = document_of("queen")["paths"][path]["post"]["responses"]
    assert set(answers["200"]["content"]) == kinds


async def test_every_route_of_a_queen_is_described_and_no_other(routes: Routes, home: Home) -> None:
    async with rbee.open_cluster(nodes=[], home=home.root, engine="echo"):
        assert described("queen") == routes


def test_every_route_of_a_hive_is_described_and_no_other(routes: Routes) -> None:
    setup: Any = SimpleNamespace(token="t" * 32, host="127.0.0.1")
    nothing: Any = SimpleNamespace()
    hive_app.make_app(setup, nothing, nothing, nothing, print)
    assert described("hive") == routes


def test_every_route_of_a_worker_is_described_and_no_other(routes: Routes) -> None:
    worker: Any = SimpleNamespace(config=SimpleNamespace(host="127.0.0.1", token="t" * 32))
    worker_app.make_app(worker)
    assert described("worker") == routes


@attrs.frozen
class Inner:
    name: str


@attrs.frozen
class Outer:
    """A thing.

    Attributes:
        first, second: what they are,
            on two lines.
    """

    first: int | None
    second: tuple[Inner, ...] = ()
    third: dict[str, float] = attrs.field(factory=dict)
    fourth: str = "x"


def test_a_class_becomes_a_schema() -> None:
    schemas = Schemas()
    assert schemas.of(Outer) == {"$ref": "#/components/schemas/Outer"}
    inner = {"$ref": "#/components/schemas/Inner"}
    about = "what they are, on two lines."
    assert schemas.named["Outer"] == {
        "type": "object",
        "description": "A thing.",
        "properties": {
            "first": {"anyOf": [{"type": "integer"}, {"type": "null"}], "description": about},
            "second": {"type": "array", "items": inner, "description": about},
            "third": {"type": "object", "additionalProperties": {"type": "number"}},
            "fourth": {"type": "string", "default": "x"},
        },
        "required": ["first"],
        "additionalProperties": False,
    }
    assert schemas.named["Inner"]["required"] == ["name"]
    with pytest.raises(TypeError, match="no schema of"):
        schemas.of(partial)
