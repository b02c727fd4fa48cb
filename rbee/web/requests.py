"""What a daemon's requests came to, and what each of its answers carries."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import attrs

from rbee.metrics import LONG, ByName, Labels, counter, gauge, histogram
from rbee.trace import REQUEST_ID, Trace
from rbee.web.door import Headers
from rbee.web.out import Out

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

OVERHEAD = b"x-rbee-overhead-ms"
CLIENT_GONE = "client_gone"
GONE_STATUS = 499  # for figures only: nobody was there to get one


@attrs.define(eq=False)
class Extra:
    """The headers that an answer has whatever it is, as they are when its head is sent."""

    trace: Trace
    tells_overhead: bool
    cors: Headers = ()

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        yield from self.cors
        yield REQUEST_ID, self.trace.id.encode()
        overhead = self.trace.note_head()
        if self.tells_overhead:
            yield OVERHEAD, b"%.3f" % (1000 * overhead)


def _nothing(trace: Trace) -> None:
    pass


@attrs.define(eq=False)
class Requests:
    """The requests of one daemon.

    Attributes:
        seen: is told of each when it has ended.
    """

    seen: Callable[[Trace], None] = _nothing
    _running: Counter[str] = attrs.field(factory=Counter)
    _ended: Counter[Labels] = attrs.field(factory=Counter)
    _seconds: ByName = attrs.field(factory=lambda: ByName(LONG))

    def counted(self, route: str, trace: Trace, out: Out) -> Counted:
        """Count a request, as running while the body does."""
        return Counted(self, route, trace, out)

    def _begin(self, route: str) -> None:
        self._running[route] += 1

    def _end(self, route: str, trace: Trace, out: Out) -> None:
        self._running[route] -= 1
        self._ended[route, str(out.status or GONE_STATUS), trace.error] += 1
        self._seconds.of(route).observe(time.monotonic() - trace.began)
        self.seen(trace)

    def collect(self, component: str) -> Iterable[Metric]:
        """Make their figures; ``component`` stands in the names."""
        prefix = f"rbee_{component}_request"
        running: dict[Labels, float] = {(name,): n for name, n in self._running.items()}
        yield counter(
            f"{prefix}s_total", "Requests that have ended, by what they came to.", self._ended,
            ("route", "code", "error"),
        )  # fmt: skip
        yield gauge(f"{prefix}s_running", "Requests that are being answered.", running, ("route",))
        text = "From a request's head to the end of its answer."
        yield histogram(f"{prefix}_seconds", text, self._seconds.all(), ("route",))


class Counted:
    """The count of one request (`Requests.counted`)."""

    __slots__ = ("_out", "_requests", "_route", "_trace")

    def __init__(self, requests: Requests, route: str, trace: Trace, out: Out) -> None:
        self._requests = requests
        self._route = route
        self._trace = trace
        self._out = out

    def __enter__(self) -> None:
        self._requests._begin(self._route)

    def __exit__(self, *_: object) -> None:
        self._requests._end(self._route, self._trace, self._out)
