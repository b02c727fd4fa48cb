"""The body of a refusal, back to the error that it tells."""

from __future__ import annotations

import json

from rbee.errors import RbeeError, from_wire


def error_of(status: int, body: bytes) -> RbeeError:
    """Rebuild the error that a daemon refused with."""
    try:
        error = json.loads(body)["error"]
        return from_wire(
            str(error.get("code", "")),
            str(error["message"]),
            hint=str(error.get("hint", "")),
            status=status,
            details=error.get("details") or {},
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return from_wire("", f"{status}: {body[:200].decode('utf-8', 'replace')}", status=status)
