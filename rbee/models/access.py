"""How a hub is reached: what a request brings along, for the one child that downloads.

It is never stored: from the sender's environment into the request, from there into the child's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from rbee.errors import BadInputError
from rbee.wire.messages import HubAccess

ENDPOINT, TOKEN, OFFLINE = "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"
_OLD_TOKEN = "HUGGING_FACE_HUB_TOKEN"
_OLD_OFFLINE = "TRANSFORMERS_OFFLINE"
_TRUE = ("1", "ON", "YES", "TRUE")


def read_access(environ: Mapping[str, str] = os.environ) -> HubAccess:
    """Return what our own environment says, for a request to take along."""
    offline = environ.get(OFFLINE)
    return HubAccess(
        endpoint=environ.get(ENDPOINT, "").strip(),
        token=(environ.get(TOKEN) or environ.get(_OLD_TOKEN) or "").strip(),
        offline=_is_true(offline) if offline else None,
    )


def variables_of(access: HubAccess) -> dict[str, str]:
    """Return what a request sets of the environment of the child that downloads for it.

    Raises:
        BadInputError: what no environment or request's head can hold.
    """
    for name, value in ((ENDPOINT, access.endpoint), (TOKEN, access.token)):
        if not (value.isascii() and value.isprintable()) or " " in value:
            raise BadInputError(
                f"{name} cannot be used: it has characters that are neither ASCII nor printable, "
                "or a blank",
                hint=f"export {name}=…   # where rbee-keeper runs",
            )
    offline = {} if access.offline is None else {OFFLINE: str(int(access.offline))}
    given = {ENDPOINT: access.endpoint, TOKEN: access.token} | offline
    return {name: value for name, value in given.items() if value}


def offline_by(access: HubAccess, environ: Mapping[str, str] = os.environ) -> str:
    """Return the setting that forbids to ask a hub, such as ``HF_HUB_OFFLINE=1``, or ""."""
    if access.offline is not None:
        return f"{OFFLINE}=1" if access.offline else ""
    said = [name for name in (OFFLINE, _OLD_OFFLINE) if _is_true(environ.get(name, ""))]
    return f"{said[0]}={environ[said[0]]}" if said else ""


def _is_true(text: str) -> bool:
    return text.strip().upper() in _TRUE
