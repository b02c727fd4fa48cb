"""JSON to attrs and back; unknown keys and wrong types are the caller's error, told by name."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, TypeVar

import attrs
from cattrs import transform_error
from cattrs.errors import ClassValidationError
from cattrs.preconf.json import JsonConverter, make_converter

from rbee.errors import BadInputError

T = TypeVar("T")


@cache
def _converter() -> JsonConverter:
    converter = make_converter(forbid_extra_keys=True)
    for kind in (int, float, str, bool):
        converter.register_structure_hook(kind, _strict)
    return converter


def _strict(value: Any, kind: type[Any]) -> Any:
    """Take JSON's own types only: cattrs would turn ``"5"`` into 5 and 1.5 into 1."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def to_dict(message: Any) -> Any:
    return _converter().unstructure(message)


def dumps(message: Any) -> bytes:
    return json.dumps(to_dict(message), ensure_ascii=False, separators=(",", ":")).encode()


def structure(data: Any, kind: type[T]) -> T:
    """Make ``kind`` from parsed JSON; raise `BadInputError` naming each wrong field."""
    if attrs.has(kind) and not isinstance(data, dict):
        raise BadInputError(
            f"not a valid {kind.__name__}: expected an object, got {type(data).__name__}"
        )
    try:
        return _converter().structure(data, kind)
    except (ClassValidationError, ValueError, TypeError, KeyError) as exc:
        what = (
            "; ".join(transform_error(exc)) if isinstance(exc, ClassValidationError) else str(exc)
        )
        raise BadInputError(f"not a valid {kind.__name__}: {what}") from exc


def loads(data: bytes | str, kind: type[T]) -> T:
    try:
        parsed = json.loads(data)
    except ValueError as exc:
        raise BadInputError(f"not a valid {kind.__name__}: the body is not JSON: {exc}") from exc
    return structure(parsed, kind)


def fields_of(message: Any) -> dict[str, Any]:
    """Return the attributes as they are, one level deep (for `attrs.evolve`-like copies)."""
    return {field.name: getattr(message, field.name) for field in attrs.fields(type(message))}
