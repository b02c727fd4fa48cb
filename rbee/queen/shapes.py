"""Errors as the clients of other APIs read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import attrs

from rbee.errors import RbeeError
from rbee.web.router import Response, note_refusal, refusal

OPENAI_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 408: "timeout_error", 409: "conflict_error",
    413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip
ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 408: "timeout_error", 413: "request_too_large",
    415: "invalid_request_error", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


@attrs.frozen
class Shape:
    """How one API tells errors: ``body`` makes the JSON of one."""

    body: Callable[[RbeeError], dict[str, Any]]

    def refuse(self, error: RbeeError) -> Response:
        """Make the answer to a request that is refused."""
        note_refusal(error)
        return refusal(error, _dumps(self.body(error)))

    def event(self, error: RbeeError) -> bytes:
        """Make the last event of a stream that broke off."""
        return b"event: error\ndata: " + _dumps(self.body(error)) + b"\n\n"


def _dumps(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _told(error: RbeeError) -> str:
    """Return the message with what to do next, for which these APIs have no field."""
    return f"{error.message}\ntry: {error.hint}" if error.hint else error.message


def _openai(error: RbeeError) -> dict[str, Any]:
    kind = OPENAI_TYPES.get(error.http_status, "server_error")
    param = error.details.get("param")
    return {"error": {"message": _told(error), "type": kind, "param": param, "code": error.code}}


def _anthropic(error: RbeeError) -> dict[str, Any]:
    kind = ANTHROPIC_TYPES.get(error.http_status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": _told(error)}}


OPENAI = Shape(_openai)
ANTHROPIC = Shape(_anthropic)
