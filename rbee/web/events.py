"""Server-sent events as bytes that pass by: only whole ones, so that another can follow."""

from __future__ import annotations

from rbee.wire.sse import MAX_EVENT

DONE = b"data: [DONE]"
MARKS = (b"\n\n", b"\n\r\n")  # an empty line, whatever ends the lines


class WholeEvents:
    """Holds back the event that has only begun; nothing is lost or changed.

    Of one longer than `MAX_EVENT` what has come is let through: ``torn`` tells that after it no
    other event can follow.
    """

    def __init__(self) -> None:
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
        """Whether the event with which OpenAI's streams end was the last one."""
        return self._last.rstrip(b"\r\n").endswith(DONE) and not self.torn

    def _hold(self, data: bytes) -> None:
        self._held = [data] if data else []
        self._size = len(data)

    def _end(self, data: bytes) -> int:
        """Return where in ``data`` the last event ends, 0 if none does."""
        before = b"".join(self._held[-2:])[-2:]
        text = before + data
        ends = [at + len(mark) for mark in MARKS if (at := text.rfind(mark)) >= 0]
        return max(ends) - len(before) if ends else 0
