"""A body has its time: some for any, more for what has come, and no long pause."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import pytest
import trio

from rbee.web.head import TooSlowError
from rbee.web.patience import BASE, RATE, SILENCE, Patience, Timely


async def read(size: int, pause: float) -> int:
    """Read a body without end, so much every so often; return how much came."""
    patience = Patience()
    with suppress(TooSlowError):
        while trio.current_time() < 10_000:
            await patience.wait(partial(trio.sleep, pause))
            patience.size += size
    return patience.size


async def test_who_sends_a_byte_before_each_pause_is_too_long_is_refused(
    autojump_clock: trio.abc.Clock,
) -> None:
    assert await read(1, SILENCE - 1) == 2
    assert trio.current_time() == pytest.approx(BASE)


async def test_who_sends_at_less_than_the_rate_has_longer_the_more_he_sent(
    autojump_clock: trio.abc.Clock,
) -> None:
    assert await read(RATE // 2, 1) == pytest.approx(BASE * RATE, rel=0.02)
    assert trio.current_time() == pytest.approx(2 * BASE, rel=0.02)


async def test_who_is_silent_is_refused_however_much_he_has_sent(
    autojump_clock: trio.abc.Clock,
) -> None:
    patience = Patience(size=1 << 30)
    with pytest.raises(TooSlowError, match="within 60 s, or at 64 KiB/s, without a pause of 30 s"):
        await patience.wait(trio.sleep_forever)
    assert trio.current_time() == pytest.approx(SILENCE)


async def test_who_is_as_fast_as_he_must_may_send_for_long(autojump_clock: trio.abc.Clock) -> None:
    patience = Patience()
    for _ in range(1000):
        await patience.wait(partial(trio.sleep, 1))
        patience.size += RATE
    assert trio.current_time() == pytest.approx(1000)


async def test_behind_a_body_there_is_no_hurry(autojump_clock: trio.abc.Clock) -> None:
    messages = [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.request"}]

    async def receive() -> dict[str, object]:
        await trio.sleep(SILENCE - 1 if messages else 1000)
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    timely = Timely(receive)
    assert [(await timely())["type"] for _ in range(3)] == [
        "http.request", "http.request", "http.disconnect",
    ]  # fmt: skip
