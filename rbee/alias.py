"""What an alias in ``config.toml`` says: where its model comes from, and defaults for its use.

``bee = "hf:org/repo"``, a list of sources to try in order, or a table with ``source`` (either of
the two) and defaults beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import attrs

from rbee.errors import BadInputError
from rbee.units import seconds, size

Refuse = Callable[[str, str], Exception]
"""Makes the error for one key: its name, and what is wrong with it."""

SOURCE = "source"
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: value >= 0, "at least 0"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "top_k": (lambda value: value >= -1, "at least 1 (0 or -1 is all)"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "above 0"),
    "max_tokens": (lambda value: value >= 1, "at least 1"),
    "max_model_len": (lambda value: value >= 1, "at least 1"),
    "max_num_seqs": (lambda value: value >= 1, "at least 1"),
    "slots": (lambda value: value >= 1, "at least 1"),
    "kv_cache": (lambda value: value >= 1, "above 0"),
    "stop": (lambda value: "" not in value, "texts with something in them"),
    "backend": (lambda value: value in ("cpu", "cuda"), "cpu or cuda"),
}
_FREE: tuple[Callable[[Any], bool], str] = (lambda value: True, "")
_PREFIX = "not a valid Defaults: "


@attrs.frozen
class Defaults:
    """What holds for requests under an alias where they say nothing; names as in `TaskRequest`.

    ``keep_alive``: seconds; negative: for ever. ``kv_cache``: bytes. ``slots``: requests that the
    queen gives to one worker at once, whatever its engine can do.
    """

    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    kv_cache: int | None = None
    max_num_seqs: int | None = None
    engine_args: dict[str, str] = attrs.field(factory=dict)
    backend: str | None = None
    device: str | None = None
    engine: str | None = None
    keep_alive: float | None = None
    slots: int | None = None

    def said(self) -> dict[str, Any]:
        """Return what is set."""
        values = attrs.asdict(self, recurse=False)
        return {name: value for name, value in values.items() if value not in (None, (), {})}


def read_alias(name: str, value: Any, refuse: Refuse) -> tuple[tuple[str, ...], Defaults]:
    """Return the sources and defaults that the file gives for ``name``."""
    key = f"aliases.{name}"
    if not isinstance(value, dict):
        return _sources(value, key, refuse), Defaults()
    if SOURCE not in value:
        raise refuse(key, f'needs {SOURCE} = "hf:org/repo" (or a list, or another alias)')
    given = {key.replace("-", "_"): item for key, item in value.items() if key != SOURCE}
    return _sources(value[SOURCE], f"{key}.{SOURCE}", refuse), _defaults(given, key, refuse)


def _sources(value: Any, key: str, refuse: Refuse) -> tuple[str, ...]:
    sources = [value] if isinstance(value, str) else value
    if (
        isinstance(sources, list)
        and sources
        and all(isinstance(source, str) and source for source in sources)
    ):
        return tuple(sources)
    raise refuse(key, 'must be a model name or a list of them ("pypi:…")')


def _defaults(given: dict[str, Any], key: str, refuse: Refuse) -> Defaults:
    from rbee.wire.codec import structure

    known = [field.name for field in attrs.fields(Defaults)]
    for name in given:
        if name not in known:
            raise refuse(f"{key}.{name}", f"is unknown; it takes {SOURCE}, {', '.join(known)}")
    try:
        plain = {name: _plain(name, value) for name, value in given.items()}
        defaults = structure(plain, Defaults)
    except BadInputError as exc:  # its last word is the field: "… @ $.top_k"
        raise refuse(key, f"is wrong: {exc.message.removeprefix(_PREFIX)}") from exc
    for name, value in defaults.said().items():
        good, needed = _RULES.get(name, _FREE)
        if not good(value):
            raise refuse(f"{key}.{name}", f"must be {needed}, got {value!r}")
    return defaults


def _plain(name: str, value: Any) -> Any:
    """Turn what people may write instead into what is meant."""
    match name:
        case "stop" if isinstance(value, str):
            return [value]
        case "kv_cache" if isinstance(value, str):
            return size(value)
        case "keep_alive" if isinstance(value, str):
            return seconds(value)
        case "engine_args" if isinstance(value, dict):
            return {key.replace("_", "-"): _text(item) for key, item in value.items()}
    return value


def _text(value: Any) -> str:
    """Write an engine's option as its command line has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
