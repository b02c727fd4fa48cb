"""JSON to attrs and back; unknown keys and wrong types are the caller's error, told by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, get_origin

import attrs
from cattrs import BaseConverter, transform_error
from cattrs.cols import homogenous_tuple_structure_factory, list_structure_factory
from cattrs.errors import BaseValidationError
from cattrs.preconf.json import JsonConverter, make_converter
from cattrs.v import format_exception

from rbee.errors import BadInputError

T = TypeVar("T")
Hook = Callable[[Any, Any], Any]


@cache
def _converter() -> JsonConverter:
    converter = make_converter(forbid_extra_keys=True)
    for kind in (int, float, str, bool):
        converter.register_structure_hook(kind, _strict)

    @converter.register_structure_hook_factory(attrs.has)
    def structure_object(kind: Any) -> Hook:
        return _only(dict, "an object", converter.gen_structure_attrs_fromdict(kind))

    @converter.register_structure_hook_factory(_is_list)
    def structure_list(kind: Any, converter: BaseConverter) -> Hook:
        is_list = get_origin(kind) is list
        make = list_structure_factory if is_list else homogenous_tuple_structure_factory
        return _only((list, tuple), "a list", make(kind, converter))

    return converter


def _is_list(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin in (tuple, list)


def _only(kinds: type | tuple[type, ...], name: str, hook: Hook) -> Hook:
    """Refuse what Python would iterate as well: a text is no list of its characters."""

    def structure(value: Any, kind: Any) -> Any:
        if not isinstance(value, kinds):
            raise TypeError(f"expected {name}, got {type(value).__name__}")
        return hook(value, kind)

    return structure


def _strict(value: Any, kind: type[Any]) -> Any:
    """Take JSON's own types only: cattrs would turn ``"5"`` into 5 and 1.5 into 1."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    if kind is float and not math.isfinite(value):
        raise ValueError("expected a finite number")
    if kind is str and not value.isascii():
        value.encode()  # half a surrogate pair could never be sent on
    return value


def to_dict(message: Any) -> Any:
    return _converter().unstructure(message)


def dumps(message: Any) -> bytes:
    return json.dumps(to_dict(message), ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "replace"
    )


def structure(data: Any, kind: type[T]) -> T:
    """Make ``kind`` from parsed JSON; raise `BadInputError` naming each wrong field."""
    try:
        return _converter().structure(data, kind)
    except BaseValidationError as exc:
        what = "; ".join(transform_error(exc, format_exception=_say))
        raise BadInputError(f"not a valid {kind.__name__}: {what}") from exc
    except (ArithmeticError, ValueError, TypeError, KeyError) as exc:
        what = _say(exc, None)
        raise BadInputError(f"not a valid {kind.__name__}: {what}") from exc


def _say(exc: BaseException, kind: type[Any] | None) -> str:
    if isinstance(exc, ArithmeticError | ValueError | TypeError):
        return str(exc)
    return format_exception(exc, kind)


def loads(data: bytes | str, kind: type[T]) -> T:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise BadInputError(f"not a valid {kind.__name__}: the body is not JSON: {exc}") from exc
    return structure(parsed, kind)


def fields_of(message: Any) -> dict[str, Any]:
    """Return the attributes as they are, one level deep (for `attrs.evolve`-like copies)."""
    return {field.name: getattr(message, field.name) for field in attrs.fields(type(message))}
