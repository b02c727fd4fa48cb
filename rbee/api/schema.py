"""JSON Schema of the wire classes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import attrs

Schema = dict[str, Any]

PLAIN: dict[Any, Schema] = {
    str: {"type": "string"}, int: {"type": "integer"}, float: {"type": "number"},
    bool: {"type": "boolean"}, NoneType: {"type": "null"}, Any: {},
}  # fmt: skip
# ``name, other: text`` of an "Attributes:" section, with the lines that go on below it.
ATTRIBUTE = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)


class Schemas:
    """The schemas of the classes that were asked for, by name."""

    def __init__(self) -> None:
        self.named: dict[str, Schema] = {}

    def of(self, kind: Any) -> Schema:
        """Return the schema of a type; a class is named and referred to."""
        if kind in PLAIN:
            return dict(PLAIN[kind])
        if attrs.has(kind):
            return self._reference(kind)
        origin, inner = get_origin(kind), get_args(kind)
        if origin in (tuple, list):
            return {"type": "array", "items": self.of(inner[0])}
        if origin is dict:
            return {"type": "object", "additionalProperties": self.of(inner[1])}
        if origin in (Union, UnionType):
            return {"anyOf": [self.of(one) for one in inner]}
        raise TypeError(f"no schema of {kind!r}")

    def _reference(self, kind: type[Any]) -> Schema:
        name = kind.__name__
        if name not in self.named:
            self.named[name] = {}  # it may be part of itself
            self.named[name] = self._object(kind)
        return {"$ref": f"#/components/schemas/{name}"}

    def _object(self, kind: type[Any]) -> Schema:
        hints, about = get_type_hints(kind), dict(attributes(kind))
        fields = attrs.fields(kind)
        properties = {}
        for field in fields:
            schema = self.of(hints[field.name])
            if isinstance(field.default, str | int | float | bool):
                schema["default"] = field.default
            if field.name in about:
                schema["description"] = about[field.name]
            properties[field.name] = schema
        required = [field.name for field in fields if field.default is attrs.NOTHING]
        return {
            "type": "object", "description": summary(kind), "properties": properties,
            "required": required, "additionalProperties": False,
        }  # fmt: skip


def summary(kind: type[Any]) -> str:
    """Return what a class is, less its attributes."""
    return _doc(kind).partition("Attributes:\n")[0].strip()


def attributes(kind: type[Any]) -> Iterator[tuple[str, str]]:
    """Yield what each attribute is, as the class's docstring says it."""
    for names, about in ATTRIBUTE.findall(_doc(kind).partition("Attributes:\n")[2]):
        for name in names.split(", "):
            yield name, " ".join(about.split())


def _doc(kind: type[Any]) -> str:
    return inspect.cleandoc(kind.__doc__ or "").replace("``", "`")
