"""Owns a planted daemon on a node until it is told to stop; prints its pids there."""

import json
import signal
import sys
from pathlib import Path

import trio

from rbee.aio import open_aio
from rbee.ssh import SshTarget, open_connection
from tests.ssh.nodes import LEASE, open_planted


async def cancel_on_term(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


async def main(alias: str, config: str) -> None:
    target = SshTarget("mac", alias, config=Path(config), agent="")
    async with open_aio(uvloop=False) as aio, trio.open_nursery() as nursery:
        nursery.start_soon(cancel_on_term, nursery.cancel_scope)
        async with open_connection(target, aio, lease=LEASE) as connection:
            async with open_planted(connection, "serve", "") as daemon:
                capabilities = daemon.hello.capabilities
                print(json.dumps([daemon.hello.pid, capabilities["child"]]), flush=True)
                await trio.sleep_forever()


trio.run(main, *sys.argv[1:])
