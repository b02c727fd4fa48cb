"""A queen that is found by its home: its run file is there while it serves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from rbee import daemon
from rbee.queen.machine import QueenSetup
from rbee.wire.messages import Hello


async def serve_findable(
    setup: QueenSetup,
    serving: Callable[..., Awaitable[None]],
    token_file: Path,
    say: Callable[[Hello], None],
) -> None:
    """Serve until cancelled; ``say`` is called once, when the next request would succeed."""
    async with trio.open_nursery() as nursery:
        hello = await nursery.start(serving)
        daemon.write_run_file(setup.home.queen_file, hello, setup.owner, token_file)
        say(hello)
        try:
            await trio.sleep_forever()
        finally:
            setup.home.queen_file.unlink(missing_ok=True)
