"""One sender, many readers who come and go; a reader who falls behind is cut off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import trio

T = TypeVar("T")

BEHIND = 1024


class Broadcast(Generic[T]):
    """Holds no tasks; `send` never blocks."""

    def __init__(self) -> None:
        self._readers: set[trio.MemorySendChannel[T]] = set()

    def send(self, item: T) -> None:
        for reader in list(self._readers):
            try:
                reader.send_nowait(item)
            except (trio.WouldBlock, trio.BrokenResourceError):
                reader.close()  # its iteration ends after what it has been given
                self._readers.discard(reader)

    @contextmanager
    def subscribe(self) -> Iterator[trio.MemoryReceiveChannel[T]]:
        """Receive everything sent from now on until the body ends."""
        sender, receiver = trio.open_memory_channel[T](BEHIND)
        self._readers.add(sender)
        try:
            yield receiver
        finally:
            self._readers.discard(sender)
            sender.close()
            receiver.close()
