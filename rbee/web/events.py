"""Server-sent events as bytes that pass by: only whole ones, so that another can follow."""

from __future__ import annotations

from collections.abc import Callable

from rbee.wire.sse import MAX_EVENT

DONE = b"data: [DONE]"
MARKS = (b"\n\n", b"\n\r\n")  # an empty line, whatever ends the lines


def is_done_mark(event: bytes) -> bool:
    """Tell whether an event is the one with which OpenAI's streams end."""
    return event.endswith(DONE)


class WholeEvents:
    """Holds back the event that has only begun; nothing is lost or changed.

    Of one longer than `MAX_EVENT` what has come is let through: ``torn`` tells that after it no
    other event can follow.

    Args:
        is_last: tells whether an event, without the empty line after it, is one to end with.
        must_end: whether a stream that ends without such an event has broken off.
    """

    def __init__(
        self, is_last: Callable[[bytes], bool] = is_done_mark, *, must_end: bool = False
    ) -> None:
        self._is_last = is_last
        self._must_end = must_end
        self._held: list[bytes] = []
        self._size = 0
        self._last = b""
        self.torn = False

    def feed(self, data: bytes) -> bytes:
        """Return what can be sent of all that has come."""
        if not self._held and data.endswith(b"\n\n"):
            self._last = data
            self.torn = False
            return data
        if end := self._end(data):
            whole = b"".join((*self._held, data[:end]))
            self._last = whole
            self.torn = False
            self._hold(data[end:])
            return whole
        if data:
            self._held.append(data)
            self._size += len(data)
        return self.rest() if self._size > MAX_EVENT else b""

    def rest(self) -> bytes:
        """Return what is held back, as when no more comes."""
        rest = b"".join(self._held)
        self._hold(b"")
        self.torn = self.torn or bool(rest)
        return rest

    @property
    def is_done(self) -> bool:
        """Whether the last event was one to end with."""
        last = self._last.rstrip(b"\r\n")
        begins = max((last.rfind(mark) + len(mark) for mark in MARKS if mark in last), default=0)
        return self._is_last(last[begins:]) and not self.torn

    @property
    def lacks_end(self) -> bool:
        """Whether the stream must not end here."""
        return self._must_end and not self.is_done

    @property
    def has_any(self) -> bool:
        """Whether anything has come."""
        return bool(self._last or self._held)

    def _hold(self, data: bytes) -> None:
        self._held = [data] if data else []
        self._size = len(data)

    def _end(self, data: bytes) -> int:
        """Return where in ``data`` the last event ends, 0 if none does."""
        before = b"".join(self._held[-2:])[-2:]
        text = before + data
        ends = [at + len(mark) for mark in MARKS if (at := text.rfind(mark)) >= 0]
        return max(ends) - len(before) if ends else 0
