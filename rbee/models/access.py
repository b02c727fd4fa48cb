"""How a hub is reached: what a request brings along, for the one child that downloads.

It is never stored: from the sender's environment, or his login, into the request, from there into
the child's environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rbee.errors import BadInputError
from rbee.wire.messages import HubAccess

ENDPOINT, TOKEN, OFFLINE = "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"
_OLD_TOKEN = "HUGGING_FACE_HUB_TOKEN"
_OLD_OFFLINE = "TRANSFORMERS_OFFLINE"
# Put on top of the environment of what the keeper starts and of what fetches nothing.
TOKENLESS = {TOKEN: "", _OLD_TOKEN: ""}
_NO_TOKEN = TOKENLESS | {"HF_TOKEN_PATH": os.devnull}
MAX_TOKEN = 4096
_TRUE = ("1", "ON", "YES", "TRUE")


def read_access(environ: Mapping[str, str] = os.environ, *, is_ours: bool = True) -> HubAccess:
    """Return what our own environment says, for a request to take along.

    Args:
        is_ours: whether the request goes to a queen of ours; only such a one is told the token of
            ``hf auth login``, which a node has not.
    """
    offline = environ.get(OFFLINE)
    token = (environ.get(TOKEN) or environ.get(_OLD_TOKEN) or "").strip()
    return HubAccess(
        endpoint=environ.get(ENDPOINT, "").strip(),
        token=token or (_login(environ) if is_ours else ""),
        offline=_is_true(offline) if offline else None,
    )


def _login(environ: Mapping[str, str]) -> str:
    """Return the token that ``hf auth login`` has stored; "" if there is none to be used."""
    if _is_true(environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "")):
        return ""
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(os.path.expandvars(environ.get("HF_TOKEN_PATH") or f"{home}/token"))
    try:
        with path.expanduser().open(encoding="ascii") as file:
            token = file.read(MAX_TOKEN).strip()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: ~ of nobody
        return ""
    return token if _is_sendable(token) else ""


def variables_of(access: HubAccess, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what a request sets of the environment of the child that downloads for it.

    Raises:
        BadInputError: what no environment or request's head can hold.
    """
    for name, value in ((ENDPOINT, access.endpoint), (TOKEN, access.token)):
        if not _is_sendable(value):
            raise BadInputError(
                f"{name} cannot be used: it has characters that are neither ASCII nor printable, "
                "or a blank",
                hint=f"export {name}=…   # where rbee-keeper runs",
            )
    offline = {} if access.offline is None else {OFFLINE: str(int(access.offline))}
    given = {ENDPOINT: access.endpoint, TOKEN: access.token} | offline
    found = {name: value for name, value in given.items() if value}
    is_ours = access.endpoint in ("", environ.get(ENDPOINT, "").strip())
    # Our token is for our hub: a request must not have it sent to another one.
    return found if access.token or is_ours else found | _NO_TOKEN


def offline_by(access: HubAccess, environ: Mapping[str, str] = os.environ) -> str:
    """Return the setting that forbids to ask a hub, such as ``HF_HUB_OFFLINE=1``, or ""."""
    if access.offline is not None:
        return f"{OFFLINE}=1" if access.offline else ""
    said = [name for name in (OFFLINE, _OLD_OFFLINE) if _is_true(environ.get(name, ""))]
    return f"{said[0]}={environ[said[0]]}" if said else ""


def _is_sendable(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _is_true(text: str) -> bool:
    return text.strip().upper() in _TRUE
