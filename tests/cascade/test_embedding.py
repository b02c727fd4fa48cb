"""A program's own cluster reaches to other machines, and so does its end."""

from __future__ import annotations

import time

import pytest
import trio

from rbee.testing.network_deaths import LEASE
from tests.cascade.far import open_far_hosts, register, titles
from tests.cascade.test_nodes import someone
from tests.test_cluster import open_program

pytestmark = pytest.mark.slow


def test_a_killed_program_leaves_nothing_on_the_nodes_of_its_users_registry(nonce: str) -> None:
    with open_far_hosts("linux") as hosts, someone("me", hosts, nonce) as me:
        host = hosts["linux"]
        register(me.home, "linux")

        async def kill_it() -> None:
            # Without a hive here nobody is left to remove its home but the next cluster.
            environ = {**me.environ, "TMPDIR": str(me.home.root.parent)}
            async with open_program("far", environ) as (popen, said):
                assert said == ["linux", "one two"]
                assert "llm-worker-rbee" in titles(host)
                popen.kill()
                await trio.to_thread.run_sync(popen.wait)

        trio.run(kill_it)
        deadline = time.monotonic() + LEASE + 5
        while titles(host):
            assert time.monotonic() < deadline, titles(host)
            time.sleep(0.05)
