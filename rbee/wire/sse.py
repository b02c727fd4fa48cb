"""Server-sent events: encode, and decode incrementally from any split of the bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rbee.errors import BadInputError, PeerError
from rbee.wire.codec import loads, to_dict
from rbee.wire.messages import EVENTS, TERMINAL, Event

CONTENT_TYPE = b"text/event-stream"
MAX_EVENT = 1 << 20


def encode(event: Any) -> bytes:
    """Encode one message; its class name in lower case is the event's name."""
    data = json.dumps(to_dict(event), ensure_ascii=False, separators=(",", ":"))
    return f"event: {type(event).__name__.lower()}\ndata: {data}\n\n".encode("utf-8", "replace")


def encode_token(text: str, index: int) -> bytes:
    """Encode a `Token` without the converter: this runs once per generated token."""
    data = json.dumps(text, ensure_ascii=False)
    return f'event: token\ndata: {{"t":{data},"i":{index}}}\n\n'.encode("utf-8", "replace")


class Decoder:
    """Feed bytes, take ``(name, data)`` pairs; comments and unknown fields are skipped.

    `feed_numbered` adds the number of each event, 0 where it has none.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[tuple[str, str]]:
        return ((name, data) for name, data, _ in self.feed_numbered(chunk))

    def feed_numbered(self, chunk: bytes) -> Iterator[tuple[str, str, int]]:
        # Together with the rest: a chunk may end between the two.
        self._rest = (self._rest + chunk).replace(b"\r\n", b"\n")
        while (end := self._rest.find(b"\n\n")) >= 0:
            block, self._rest = self._rest[:end], self._rest[end + 2 :]
            if event := _parse(block):
                yield event
        if len(self._rest) > MAX_EVENT:
            raise PeerError(f"an event longer than {MAX_EVENT} bytes")


def _parse(block: bytes) -> tuple[str, str, int] | None:
    name, data, number = "message", [], 0
    for line in block.decode("utf-8", "replace").split("\n"):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id" and value.isdecimal():
            number = int(value)
    return (name, "\n".join(data), number) if data else None


def event_from(name: str, data: str) -> Event | None:
    """Make the typed event of a job stream; None for a name this version does not know.

    Raises:
        PeerError: it is not what its name says.
    """
    kind = EVENTS.get(name)
    if kind is None:
        return None
    try:
        event: Event = loads(data, kind)
    except BadInputError as exc:
        raise PeerError(f"a broken {name} event: {exc.message}") from exc
    return event


_TERMINAL = tuple(f"event: {name}\n".encode() for name in TERMINAL)


def is_terminal(event: bytes) -> bool:
    """Tell whether an event of a job, as `encode` makes it, is its last one."""
    return event.startswith(_TERMINAL)
