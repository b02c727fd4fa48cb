"""The queen that runs: what it wrote about itself, and the token that opens it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import attrs

from rbee.errors import UnavailableError
from rbee.home import Home, find_home, read_token_file
from rbee.paths import full_path
from rbee.wire.messages import RunFile


def find_run_file(home: Home) -> RunFile | None:
    """Return what the home's queen wrote about itself if it is alive, without asking it."""
    if not home.queen_file.exists():
        return None
    from rbee.daemon import read_run_file

    return read_run_file(home.queen_file)


def queen_token(home: Home, record: RunFile | None, url: str, token_file: str = "") -> str:
    """Return the token for the queen at ``url``; "" if there is none to send.

    Without ``token_file`` only a queen on this machine, or the home's own, gets the home's.
    """
    if token_file:
        return read_token_file(full_path(token_file))
    ours = record is not None and record.url == url
    if not ours and not is_loopback(url):
        return ""  # the home's token opens the home's queen; it is nobody else's to see
    path = Path(record.token_file) if record and ours else home.token_file
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def is_loopback(url: str) -> bool:
    """Tell whether what is sent to ``url`` stays on this machine."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name, or no address at all
        return False


@attrs.frozen
class Access:
    """Where a queen is and what it wants to see; ``owner`` is "" where that is not known."""

    url: str
    token: str = attrs.field(repr=False)
    owner: str = ""


def find_access(
    url: str | None = None,
    token: str | None = None,
    *,
    home: Path | str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Access:
    """Fill in what is not given, as `rbee-keeper` does.

    The address: ``RBEE_QUEEN_URL``, else the running queen of the home. The token: the file
    ``RBEE_TOKEN_FILE``, else that queen's, else the home's for a queen on this machine.

    Raises:
        UnavailableError: no address is given and no queen runs.
        MachineError: the token cannot be read.
    """
    place = find_home(home, environ)
    record = find_run_file(place)
    where = environ.get("RBEE_QUEEN_URL", "") if url is None else url
    if url is None and not where:
        if record is None:
            raise UnavailableError(
                f"no queen of {place.root} runs", code="no_queen", hint="rbee-keeper queen start"
            )
        where = record.url
    where = where.rstrip("/")
    owner = record.owner if record is not None and record.url == where else ""
    if token is None:
        token = queen_token(place, record, where, environ.get("RBEE_TOKEN_FILE", ""))
    return Access(where, token, owner)
