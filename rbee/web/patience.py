"""How long a request's body may take to come: a while, and longer the more of it has come."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

import attrs
import trio

from rbee.web.head import TooSlowError
from rbee.web.out import Receive

T = TypeVar("T")

BASE = 60.0  # seconds for any body
RATE = 64 << 10  # bytes that buy a second more; so the greatest may take ten minutes
SILENCE = 30.0  # seconds without a byte


@attrs.define(eq=False)
class Patience:
    """Bounds the waits for one body.

    Attributes:
        size: bytes of it that have come, without their framing.
    """

    size: int = 0
    _began: float = float("inf")

    async def wait(self, receive: Callable[[], Awaitable[T]]) -> T:
        """Wait for more; the time is counted from the first wait on.

        Raises:
            TooSlowError: it has not come in time.
        """
        now = trio.current_time()
        self._began = min(self._began, now)
        with trio.move_on_at(min(now + SILENCE, self._began + BASE + self.size / RATE)):
            return await receive()
        raise TooSlowError(
            f"a body must come within {BASE:.0f} s, or at {RATE >> 10} KiB/s, "
            f"without a pause of {SILENCE:.0f} s"
        )


@attrs.define(eq=False)
class Timely:
    """ASGI's ``receive`` with a bound on how long the body takes, not on what comes after it.

    Attributes:
        scope: for an app that is not ours, which gets `or_cancel`, to run in.
        ran_out: why that was cancelled.
    """

    _receive: Receive
    _patience: Patience = attrs.field(factory=Patience)
    _is_whole: bool = False
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    ran_out: TooSlowError | None = None

    async def __call__(self) -> MutableMapping[str, Any]:
        """Receive, or raise `TooSlowError`."""
        if self._is_whole:
            return await self._receive()
        message = await self._patience.wait(self._receive)
        self._patience.size += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        return message

    async def or_cancel(self) -> MutableMapping[str, Any]:
        try:
            return await self()
        except TooSlowError as error:
            self.ran_out = error
            self.scope.cancel(reason="the body came too slowly")
            await trio.sleep_forever()
