"""What the names in requests stand for here: `config.toml`'s aliases and their defaults."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import attrs

from rbee.alias import Defaults
from rbee.config import Config, load_config
from rbee.models.reference import meaning_of, meanings, parse
from rbee.wire.messages import Message, PullModel, StartWorker, TaskRequest

OPTIONS = ("max_model_len", "dtype", "max_num_seqs", "backend", "device", "engine", "keep_alive")
SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed",
)  # fmt: skip
KNOWN = 1000  # names whose meanings are kept
Request = TypeVar("Request", TaskRequest, StartWorker)
Provided = TypeVar("Provided", StartWorker, PullModel)


def with_defaults(request: TaskRequest, defaults: Defaults) -> TaskRequest:
    """Fill what a request leaves open; what it says wins."""
    return _with_system(_filled(request, defaults, (*OPTIONS, *SAMPLING)), defaults.system)


def with_start_defaults(request: StartWorker, defaults: Defaults) -> StartWorker:
    """Fill what the start of a worker leaves open."""
    return _filled(request, defaults, OPTIONS)


def _filled(request: Request, defaults: Defaults, names: tuple[str, ...]) -> Request:
    changes = {
        name: getattr(defaults, name)
        for name in names
        if getattr(request, name) in (None, (), "") and getattr(defaults, name) not in (None, ())
    }
    if request.kv_cache_bytes is None:
        changes["kv_cache_bytes"] = defaults.kv_cache
    changes["engine_args"] = {**defaults.engine_args, **request.engine_args}
    return attrs.evolve(request, **changes)


def _with_system(request: TaskRequest, system: str | None) -> TaskRequest:
    """Put the system message first, unless the request has one or wants no template."""
    said = request.messages
    if said is None and request.prompt:
        said = (Message("user", request.prompt),)
    if not system or request.raw or not said or said[0].role == "system":
        return request
    return attrs.evolve(request, prompt=None, messages=(Message("system", system), *said))


class Aliases:
    """The aliases of one home, read again when the file has changed.

    ``engine``: of requests that say none and whose alias has none; "" leaves it open.
    """

    def __init__(self, file: Path, engine: str = "") -> None:
        self._file = file
        self._engine = engine
        self._config = Config()
        self._seen: tuple[int, ...] | None = None
        self._meanings: dict[str, frozenset[str]] = {}
        self._slots: dict[str, int] = {}

    def fill(self, request: TaskRequest) -> TaskRequest:
        """Apply the defaults of the alias that a request names, then the engine.

        Raises:
            ConfigError: the file is wrong.
        """
        defaults = self._read().defaults.get(request.model)
        filled = request if defaults is None else with_defaults(request, defaults)
        return self._with_engine(filled)

    def fill_start(self, request: StartWorker) -> StartWorker:
        """Apply the start options of the alias that a request names, then the engine.

        Raises:
            ConfigError: the file is wrong.
        """
        defaults = self._read().defaults.get(request.model)
        filled = request if defaults is None else with_start_defaults(request, defaults)
        return self._with_engine(filled)

    def _with_engine(self, request: Request) -> Request:
        if request.engine or not self._engine:
            return request
        return attrs.evolve(request, engine=self._engine)

    def spell_out(self, request: Provided) -> Provided:
        """Say what the model's name stands for here: elsewhere the config may say another thing.

        Raises:
            ConfigError: the file is wrong.
            BadInputError: the alias leads back to itself.
        """
        if request.sources:
            return request
        meaning = meaning_of(request.model, self._read().aliases)
        return attrs.evolve(request, alias=meaning.alias, sources=meaning.sources)

    def check(self, name: str) -> None:
        """Refuse a name that means nothing here; looks at the disk.

        Raises:
            NotFoundError: there is no such alias or path, and it is no name of another sort.
            BadInputError: it is of a sort but malformed.
            ConfigError: the file is wrong.
        """
        parse(name, self._read().aliases)

    def slots_of(self, names: Iterable[str]) -> int | None:
        """Return how many requests at once the file lets a model's workers have, if it says so."""
        slots = self._slots
        return next((slots[name] for name in names if name in slots), None) if slots else None

    def meanings(self, name: str) -> frozenset[str]:
        """Return every name of what ``name`` means, as the file was when it was last read."""
        found = self._meanings.get(name)
        if found is None:
            if len(self._meanings) >= KNOWN:
                self._meanings.clear()
            found = self._meanings[name] = meanings(name, self._config.aliases)
        return found

    def _read(self) -> Config:
        seen = self._stamp()
        if seen != self._seen:
            self._config = load_config(self._file)
            self._slots = {
                name: said.slots for name, said in self._config.defaults.items() if said.slots
            }
            self._meanings.clear()
            self._seen = seen
        return self._config

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._file)  # noqa: PTH116  # once per request: half of Path.stat
        except OSError:
            return ()
        return (found.st_mtime_ns, found.st_size, found.st_ino)
