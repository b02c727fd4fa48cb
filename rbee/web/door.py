"""Who may speak to a daemon: the names it answers to, pages of browsers, and the token.

Browsers reach loopback, so a page from anywhere can send to us. Three things keep it out without
the token: a ``Host`` that is a name and not ours (DNS rebinding needs one; an address cannot be
rebound), any ``Origin`` that was not allowed, and bodies that are not ``application/json``, which
no page may send elsewhere without asking first (`Request.read`).
"""

from __future__ import annotations

import hmac
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any, Protocol

import attrs
import trio

from rbee.errors import (
    BadInputError,
    ForbiddenError,
    TooManyFailuresError,
    UnauthorizedError,
    UsageError,
)

Headers = tuple[tuple[bytes, bytes], ...]

ONCE = (b"host", b"origin", b"authorization", b"x-api-key", b"content-type")
CORS: Headers = (
    (b"access-control-allow-methods", b"GET, POST, PATCH, PUT, DELETE"),
    (
        b"access-control-allow-headers",
        b"authorization, content-type, prefer, last-event-id, x-request-id",
    ),
    (b"access-control-max-age", b"600"),
)
EXPOSED = (
    b"x-rbee-job-id, retry-after, location, preference-applied, x-request-id, x-rbee-overhead-ms"
)

_HOST = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<name>[^:\[\]]+))(?::[0-9]*)?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[^/:?#@\s*\[\]]+)(?::[0-9]+)?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


@attrs.define(eq=False)
class Failures:
    """How often each peer may still come without the token: ``burst`` at once, then one a second.

    It only chooses the answer to a failure; whoever has the token passes, for an address may be
    shared. Of more than ``peers`` addresses the one that has not failed for longest is forgotten.
    """

    burst: float = 10.0
    peers: int = 1024
    _left: dict[str, tuple[float, float]] = attrs.field(factory=dict)

    def is_over(self, peer: str) -> bool:
        """Note a failure; tell whether the peer has had its share."""
        now = trio.current_time()
        left, since = self._left.pop(peer, (self.burst, now))
        left = min(self.burst, left + now - since)
        over = left < 1
        self._left[peer] = (left if over else left - 1, now)
        if len(self._left) > self.peers:
            del self._left[next(iter(self._left))]
        return over


class Caller(Protocol):
    """Who comes with a key of his own instead of the token."""

    @property
    def name(self) -> str: ...

    def using(self) -> AbstractContextManager[None]:
        """Count a request while the body runs; raise if he has too many."""
        ...


class Keyring(Protocol):
    def find(self, sent: bytes) -> Caller | None:
        """Return whose key that is."""
        ...


class Door:
    """The checks before any route, in their order: host, origin, token."""

    def __init__(
        self,
        token: str,
        hosts: Iterable[str],
        allowed_origins: Iterable[str],
        keys: Keyring | None = None,
    ) -> None:
        self._token = token.encode()
        self._keys = keys
        self._hosts = {"localhost", *(host.lower() for host in hosts if host)}
        self._origins = {origin.encode() for origin in allowed_origins}
        self._failures = Failures()

    def admit(self, headers: Mapping[bytes, bytes]) -> None:
        """Refuse whom a browser may have been tricked to send."""
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_ours(host):
            raise ForbiddenError(
                f"Host {host[:100]!r} is not this daemon, whose names are localhost, "
                "the one it listens on and any IP address",
                code="unknown_host",
            )
        if b"origin" in headers and headers[b"origin"] not in self._origins:
            raise ForbiddenError(
                "requests from web pages are not allowed",
                hint="queen-rbee daemon --allow-origin https://the.page",
                code="origin",
            )

    def authorize(
        self, headers: Mapping[bytes, bytes], client: Any, *, for_keys: bool = False
    ) -> Caller | None:
        """Refuse whoever does not send the token, nor, if those may come in, a key.

        Args:
            client: ASGI's.

        Returns:
            whose key it is; None for the token.
        """
        scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
        # No token is not the empty one: an empty token must not open the door.
        if self._token and scheme.lower() == b"bearer" and hmac.compare_digest(sent, self._token):
            return None
        if self._keys is not None and sent and scheme.lower() == b"bearer":
            caller = self._keys.find(sent)
            if caller is not None and not for_keys:
                raise ForbiddenError(
                    f"the key {caller.name!r} opens the routes of models only", code="not_for_keys"
                )
            if caller is not None:
                return caller
        if self._failures.is_over(peer_of(client)):
            raise TooManyFailuresError("too many requests without a valid token came from there")
        raise UnauthorizedError(
            "a valid token is required (Authorization: Bearer …)", hint="cat ~/.rbee/token"
        )

    def cors(self, headers: Mapping[bytes, bytes]) -> Headers:
        """Return what an answer needs so that a page of an allowed origin may read it."""
        if not self._origins:
            return ()
        vary, origin = (b"vary", b"origin"), headers.get(b"origin")
        if origin is None or origin not in self._origins:
            return (vary,)
        allow = (b"access-control-allow-origin", origin)
        return (vary, allow, (b"access-control-expose-headers", EXPOSED))

    def _is_ours(self, host: str) -> bool:
        is_address, name = _parse_host(host)
        return is_address or name in self._hosts


@lru_cache(maxsize=64)
def _parse_host(host: str) -> tuple[bool, str]:
    """Tell whether ``Host`` is an address; else return the name in it, "" if it is malformed."""
    match = _HOST.fullmatch(host)
    if match is None:
        return False, ""
    v6, name = match["v6"], (match["name"] or "").lower()
    address = _address(v6 or name)
    if address is None:
        return False, name
    return bool(v6) == (address.version == 6), ""


def _address(text: str) -> Any:
    try:
        return ip_address(text)
    except ValueError:
        return None


def peer_of(client: Any) -> str:
    """Return the address of ASGI's ``client``; an IPv6 network counts as one peer."""
    host = str(client[0]) if client else ""
    address = _address(host)
    if not isinstance(address, IPv6Address):
        return host
    mapped = address.ipv4_mapped
    return str(mapped) if mapped else str(IPv6Network((int(address) >> 64 << 64, 64)))


def one_each(raw: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return headers by name; refuse two where a proxy may have looked at the other one."""
    pairs = list(raw)
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        for name in ONCE:
            if counts[name] > 1:
                raise BadInputError(f"the header {name.decode()} came {counts[name]} times")
    return found


def with_key(headers: Mapping[bytes, bytes]) -> Mapping[bytes, bytes]:
    """Return headers with the token of ``x-api-key``, where Anthropic's clients send it."""
    key = headers.get(b"x-api-key")
    if key is None or b"authorization" in headers:
        return headers
    return {**headers, b"authorization": b"Bearer " + key}


def is_preflight(method: str, headers: Mapping[bytes, bytes]) -> bool:
    """Tell whether a browser asks what a page may send; it never sends the token then."""
    return (
        method == "OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers
    )


def checked_origin(text: str) -> str:
    """Return an origin as browsers send it: ``https://page.example``, a port if it is unusual.

    Raises:
        UsageError: it is none. ``*`` and ``null``, which any page can be, are none either.
    """
    origin = text.lower().removesuffix("/")
    scheme = origin.partition(":")[0]
    if port := _DEFAULT_PORTS.get(scheme):
        origin = origin.removesuffix(port)
    if not _ORIGIN.fullmatch(origin) or not origin.isascii():
        raise UsageError(
            f"--allow-origin takes SCHEME://HOST[:PORT] of one site, got {text!r}",
            hint="--allow-origin https://chat.example",
        )
    return origin
