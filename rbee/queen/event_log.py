"""The events of one job, kept for readers who come, go and come back."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator

import trio

from rbee.errors import BadInputError, GoneError

LIMIT = 1 << 20  # bytes of one job's events
PIECE = 64 << 10  # bytes that a reader gets at once


class EventLog:
    """The last events of a job, numbered from 1, each with its ``id:`` line.

    When they are too many the oldest go. Readers keep their own place and wait for nothing but
    more, so none of them delays the job or another reader.

    Args:
        grown: told by how many bytes `size` has changed.
    """

    def __init__(
        self, grown: Callable[[int], None] = lambda size: None, *, limit: int = LIMIT
    ) -> None:
        self._grown = grown
        self._limit = limit
        self._data = bytearray()
        self._base = 0  # bytes that have gone
        self._ends = array("Q")  # where each event ends, counted from the first ever
        self._more: trio.Event | None = None
        self.first = 1
        self.is_over = False

    @property
    def last(self) -> int:
        """The number of the last event; 0 before there is one."""
        return self.first + len(self._ends) - 1

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return len(self._data) + len(self._ends) * self._ends.itemsize

    def extend(self, events: bytes) -> None:
        """Add whole events, as `rbee.wire.sse.encode` makes them."""
        before = self.size
        for event in events.split(b"\n\n")[:-1]:
            self._data += b"id: %d\n%b\n\n" % (self.last + 1, event)
            self._ends.append(self._base + len(self._data))
        if self.size > self._limit:
            self._drop(self._limit - self._limit // 8)
        self._grown(self.size - before)
        self._wake()

    def shrink(self) -> None:
        """Let the older half go."""
        before = self.size
        self._drop(before // 2)
        self._grown(self.size - before)

    def end(self) -> None:
        """Tell the readers that no more comes."""
        self.is_over = True
        self._wake()

    def after(self, seen: int) -> tuple[bytes, int]:
        """Return what follows the event of a number, and the number of the last event of that.

        Raises:
            GoneError: the next one has been dropped.
            BadInputError: there has been no such event.
        """
        if seen + 1 < self.first:
            raise GoneError(
                f"the events up to {self.first - 1} are not kept any more",
                code="events_gone",
                hint=f"Last-Event-ID: {self.first - 1}",
                first=self.first,
            )
        if seen > self.last:
            raise BadInputError(f"there is no event {seen} yet; the last one is {self.last}")
        begin = self._end_of(seen)
        most = bisect_right(self._ends, begin + PIECE) + self.first - 1
        until = min(max(most, seen + 1), self.last)
        return bytes(self._data[begin - self._base : self._end_of(until) - self._base]), until

    async def wait(self, seen: int) -> None:
        """Return when there is an event after ``seen``, or can be none."""
        while self.last <= seen and not self.is_over:
            if self._more is None:
                self._more = trio.Event()
            await self._more.wait()

    def newest(self) -> Iterator[bytes]:
        """Iterate the events, the last one first."""
        for number in range(self.last, self.first - 1, -1):
            begin, end = self._end_of(number - 1), self._end_of(number)
            yield bytes(self._data[begin - self._base : end - self._base])

    def _end_of(self, number: int) -> int:
        return self._ends[number - self.first] if number >= self.first else self._base

    def _drop(self, size: int) -> None:
        """Let the oldest events go until the rest, or the last one alone, is no more than that."""
        until, width = self._base + len(self._data), self._ends.itemsize
        gone, end, left = 0, self._base, len(self._ends)
        while gone < left - 1 and until - end + (left - gone) * width > size:
            end = self._ends[gone]
            gone += 1
        del self._data[: end - self._base]
        del self._ends[:gone]
        self._base = end
        self.first += gone

    def _wake(self) -> None:
        if self._more is not None:
            self._more.set()
            self._more = None
