"""What an engine is. Engines register in the entry-point group ``rbee.engines``.

An `EngineKind` is made without arguments from the entry point; it is cheap to import: heavy
imports belong into `preload` and `open`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from typing import Any, Protocol, cast

import attrs

from rbee.errors import NotFoundError
from rbee.hints import infer
from rbee.model import DEFAULT_ENGINE, WorkerSpec
from rbee.wire.messages import ExecuteRequest

GROUP = "rbee.engines"

ASGIApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]


class Progress(Protocol):
    """Takes what the loading is at."""

    def __call__(self, text: str, share: float | None = None) -> None:
        """Note the step, in words for people, and how much of it is done, 0 … 1, where that is
        known. Called in trio's thread."""
        ...


@attrs.frozen
class Chunk:
    """What one step brought: ``text`` (may be ""), its number of tokens, and the stop reason.

    ``finish`` is None until the last chunk; then ``stop`` (end of text or stop string), ``length``.
    """

    text: str
    tokens: int
    finish: str | None = None


class Generation(Protocol):
    """One running request; leaving its context aborts it in the engine."""

    tokens_in: int

    def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        """Yield what has come since the last step; ends after the chunk with ``finish``."""
        ...


class Engine(Protocol):
    """One loaded model."""

    context: int
    """How many tokens prompt and answer may have together."""

    slots: int
    """How many requests it works on at once; more wait in it. 0 if there is no such bound."""

    app: ASGIApp | None
    """The engine's own HTTP API, mounted behind the worker, called in trio."""

    def running(self) -> int:
        """Return how many requests are in the engine, those of its own API included."""
        ...

    def metrics(self) -> str:
        """Return the engine's own figures as Prometheus text, "" if it keeps none."""
        ...

    def generate(self, request: ExecuteRequest) -> AbstractAsyncContextManager[Generation]:
        """Start a request.

        Raises:
            BadInputError: the prompt or a parameter is not acceptable (empty, too long, …).
            PeerError: the engine died; also raised while iterating.
        """
        ...

    async def wait_dead(self) -> str:
        """Return why, within a second of the engine's death; never return otherwise."""
        ...


class EngineKind(Protocol):
    """How workers of one sort come into being."""

    name: str
    needs_model: bool
    """Whether the hive provisions a model directory (False: the reference is just a name)."""

    def preload(self) -> None:
        """Import what a worker will need; runs once in the zygote, which then forks workers.

        Must leave one thread, no asyncio loop and no CUDA context behind.
        """
        ...

    def check(self, spec: WorkerSpec) -> None:
        """Refuse, without heavy imports, what cannot work here (no GPU, package missing)."""
        ...

    def open(
        self, spec: WorkerSpec, *, run_dir: str, progress: Progress
    ) -> AbstractAsyncContextManager[Engine]:
        """Load the model, serve until left, then free everything.

        Raises:
            RbeeError: the model cannot be loaded; the message says what was needed and had.
        """
        ...


def engine_kind(name: str) -> EngineKind:
    """Find an engine by name among the installed entry points."""
    entry = _own_entries().get(name)
    if entry is None:
        found = {entry.name: entry for entry in entry_points(group=GROUP)}
        if name not in found:
            raise NotFoundError(
                f"no engine {name!r}; installed: {', '.join(sorted(found))}",
                code="unknown_engine",
                hint=infer("--engine", DEFAULT_ENGINE),
            )
        entry = found[name]
    return cast(EngineKind, entry.load()())


@cache
def _own_entries() -> dict[str, EntryPoint]:
    """Return the engines of our own package: to look into all that is installed takes long."""
    try:
        own = distribution("rbee").entry_points
    except PackageNotFoundError:
        return {}
    return {entry.name: entry for entry in own.select(group=GROUP)}
