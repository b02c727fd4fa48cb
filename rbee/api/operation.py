"""One route, and what an OpenAPI document says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import attrs

from rbee.api.schema import Schema, Schemas
from rbee.wire.messages import ErrorBody

JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
ANYTHING: Any = Any
"""JSON that is another API's business."""

# What any route may answer: a head that is no good, no token, the wrong one, a page of a browser,
# failures that come too fast, a bug.
ALWAYS = (400, 401, 403, 429, 500)
WITH_BODY = (408, 413, 415)

HEADERS: dict[str, Schema] = {
    "X-Request-Id": {
        "description": "What the request is called in the logs.", "required": True,
        "schema": {"type": "string"},
    },
    "X-Rbee-Overhead-Ms": {
        "description": "Milliseconds that it took itself until the answer began.",
        "required": True, "schema": {"type": "number"},
    },
}  # fmt: skip
# What a refusal of ours says beside its body. A worker's own that is passed on may lack it.
SAID: dict[int, tuple[str, Schema]] = {
    401: ("WWW-Authenticate", {"description": "`Bearer`.", "schema": {"type": "string"}}),
    405: ("Allow", {"description": "What the path does take.", "schema": {"type": "string"}}),
}
SAID[429] = SAID[503] = (
    "Retry-After",
    {"description": "Seconds until it may go better.", "schema": {"type": "integer"}},
)


@attrs.frozen
class Operation:
    """One route of a daemon.

    Attributes:
        about: what it does; the first line is its summary.
        takes: the class of its body, if it has one.
        gives: what each status of success carries: a type, `TEXT`, or None for nothing.
        refuses: statuses of its errors beyond those of every route.
        events: what its answer consists of where the client accepts events.
        only_events: whether its 200 is events only.
        may_stream: whether it may answer with events that are another API's business.
        headers: what else a request may say, by the name of its header.
        is_open: whether it needs no token.
        takes_key: whether the token may come as `x-api-key`.
        tells_overhead: whether what it gives tells what it took itself.
        error: the class or the schema of its errors.

    What is no class of ours is a schema with a title.
    """

    method: str
    path: str
    about: str
    takes: Any = None
    gives: Mapping[int, Any] = {200: ANYTHING}
    refuses: tuple[int, ...] = ()
    events: tuple[type[Any], ...] = ()
    only_events: bool = False
    may_stream: bool = False
    headers: Mapping[str, str] = {}
    needs_body: bool = True
    is_open: bool = False
    takes_key: bool = False
    tells_overhead: bool = False
    error: Any = ErrorBody

    def told(self, schemas: Schemas) -> Schema:
        """Return what the document has below the path and the method."""
        first, _, rest = self.about.partition("\n")
        found: Schema = {"summary": first, "operationId": self._id()}
        if rest.strip():
            found["description"] = " ".join(rest.split())
        if parameters := [*self._in_path(), *self._in_headers()]:
            found["parameters"] = parameters
        if self.takes is not None:
            body = {"content": {JSON: {"schema": schema_of(self.takes, schemas)}}}
            found["requestBody"] = {**body, "required": self.needs_body}
        found["responses"] = {**self._successes(schemas), **self._refusals()}
        if self.is_open:
            found["security"] = []
        elif self.takes_key:
            found["security"] = [{"bearer": []}, {"key": []}]
        return found

    def _id(self) -> str:
        words = re.findall(r"[a-zA-Z0-9]+", self.path)
        return "_".join([self.method.lower(), *words])

    def _in_path(self) -> list[Schema]:
        names = re.findall(r"{(\w+)}", self.path)
        return [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]

    def _in_headers(self) -> list[Schema]:
        return [
            {"name": name, "in": "header", "description": about, "schema": {"type": "string"}}
            for name, about in self.headers.items()
        ]

    def _successes(self, schemas: Schemas) -> Schema:
        return {str(status): self._success(status, schemas) for status in self.gives}

    def _success(self, status: int, schemas: Schemas) -> Schema:
        kind, content = self.gives[status], {}
        if kind == TEXT:
            content[TEXT] = {"schema": {"type": "string"}}
        elif kind is not None and not (self.only_events and status == 200):
            content[JSON] = {"schema": schema_of(kind, schemas)}
        if self.may_stream and status == 200:
            content[EVENTS] = {}
        found: Schema = {"description": HTTPStatus(status).phrase, "headers": self._says(status)}
        if self.events and status == 200:
            content[EVENTS] = {}  # OpenAPI 3.1 has no words for events
            found["description"] = "; ".join(f"`{event_name(one)}`" for one in self.events)
            found["x-events"] = {event_name(one): schemas.of(one) for one in self.events}
        return {**found, "content": content} if content else found

    def _refusals(self) -> Schema:
        return {
            str(status): {"$ref": f"#/components/responses/{self._name(status)}"}
            for status in self._statuses()
        }

    def refusals(self, schemas: Schemas) -> Schema:
        """Return the answers that `told` refers to."""
        content = {JSON: {"schema": schema_of(self.error, schemas)}}
        return {
            self._name(status): {
                "description": phrase(status),
                "headers": self._refuses_with(status),
                "content": content,
            }
            for status in self._statuses()
        }

    def _says(self, status: int) -> Schema:
        found = _headers("X-Request-Id")
        if self.tells_overhead:
            found |= _headers("X-Rbee-Overhead-Ms")
        return found if status < 400 else found | self._refuses_with(status)

    def _refuses_with(self, status: int) -> Schema:
        found = _headers("X-Request-Id")
        if status in SAID:
            name, header = SAID[status]
            found[name] = {**header, "required": self.error is ErrorBody}
        return found

    def _statuses(self) -> list[int]:
        found = {*ALWAYS, *self.refuses, *(WITH_BODY if self.takes is not None else ())}
        return sorted(found - {401} if self.is_open else found)

    def _name(self, status: int) -> str:
        return f"{name_of(self.error)}{status}"


def _headers(name: str) -> Schema:
    return {name: {"$ref": f"#/components/headers/{name}"}}


def event_name(kind: type[Any]) -> str:
    return kind.__name__.lower()


def phrase(status: int) -> str:
    """Return what a status is called; 499 is nginx's for a client that went away."""
    return "Cancelled" if status == 499 else HTTPStatus(status).phrase


def name_of(kind: Any) -> str:
    return str(kind["title"]) if isinstance(kind, dict) else kind.__name__


def schema_of(kind: Any, schemas: Schemas) -> Schema:
    """Return a reference to a class, or to a schema with a title."""
    if not isinstance(kind, dict):
        return schemas.of(kind)
    schemas.named[name_of(kind)] = kind
    return {"$ref": f"#/components/schemas/{name_of(kind)}"}


def document(title: str, about: str, version: str, operations: list[Operation]) -> Schema:
    """Return an OpenAPI document, less its servers: a daemon is wherever it was started."""
    schemas = Schemas()
    paths: dict[str, Schema] = {}
    refusals: dict[str, Schema] = {}
    for one in operations:
        paths.setdefault(one.path, {})[one.method.lower()] = one.told(schemas)
        refusals |= one.refusals(schemas)
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "description": about, "version": version},
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": schemes,
            "headers": HEADERS,
            "responses": {name: refusals[name] for name in sorted(refusals)},
            "schemas": {name: schemas.named[name] for name in sorted(schemas.named)},
        },
    }
