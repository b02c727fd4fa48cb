"""Whatever ends the owner, the network or the node's sshd: nothing is left on the node."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from rbee.aio import Aio
from rbee.remains import look_at
from rbee.ssh import ConnectionLostError, SshTarget, open_connection
from rbee.testing.hosts import Host, Hosts, open_hosts_sync, why_no_hosts
from tests.ssh.nodes import GRACES, LEASE, open_planted

pytestmark = pytest.mark.slow

TREE = Path(__file__).parents[2]
KILLED = GRACES[0] + 2.0  # asked to end, killed, seen
SILENT = LEASE + KILLED


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if why := why_no_hosts():
        pytest.skip(why)
    with open_hosts_sync("mac", readable=[TREE]) as hosts:
        yield hosts
        uid = hosts["mac"].uid
    for run in Path("/tmp").glob(f"rbee-{uid}-*") if uid != os.getuid() else ():
        assert [path for path in run.rglob("*") if path.is_file()] == []
        shutil.rmtree(run)


@pytest.fixture
def host(hosts: Hosts) -> Host:
    return hosts["mac"]


@asynccontextmanager
async def owner(hosts: Hosts) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Run an owner in a process of its own; its daemon is up."""
    popen = subprocess.Popen(
        [sys.executable, "-m", "tests.ssh.owner", "mac", str(hosts.ssh_config)],
        stdout=subprocess.PIPE, cwd=TREE, env={**os.environ, "PYTHONPATH": str(TREE)},
    )  # fmt: skip
    assert popen.stdout is not None
    try:
        with trio.fail_after(30):
            assert await trio.to_thread.run_sync(popen.stdout.readline, abandon_on_cancel=True)
        yield popen
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()


async def clean(host: Host, within: float) -> float:
    began = trio.current_time()
    with trio.move_on_after(within):
        while host.processes():
            await trio.sleep(0.03)
    left = [look_at(one.pid, one.identity.start) for one in host.processes()]
    assert not any(left), f"left after {within} s: {', '.join(map(str, left))}"
    return trio.current_time() - began


def partition(host: Host) -> None:
    if not host.can_partition:
        pytest.skip(host.why_no_partition)
    host.partition()


@pytest.mark.parametrize(
    ("number", "within"),
    [(signal.SIGTERM, KILLED), (signal.SIGKILL, KILLED), (signal.SIGSTOP, SILENT)],
)
async def test_the_end_of_the_owner_is_the_end_on_the_node(
    hosts: Hosts, host: Host, number: signal.Signals, within: float
) -> None:
    async with owner(hosts) as popen:
        assert len(host.processes()) >= 4  # two guards, the daemon, its child
        popen.send_signal(number)
        await clean(host, within)
        if number == signal.SIGTERM:
            with trio.fail_after(5):
                assert await trio.to_thread.run_sync(popen.wait) == 0


async def test_a_partition_ends_it_within_the_lease(hosts: Hosts, host: Host) -> None:
    async with owner(hosts):
        partition(host)
        try:
            await clean(host, SILENT)
        finally:
            host.heal()


async def test_killed_sessions_end_it_at_once(hosts: Hosts, host: Host) -> None:
    async with owner(hosts):
        host.kill_sessions()
        await clean(host, KILLED)


async def test_a_killed_guard_is_the_end_of_its_daemon(hosts: Hosts, host: Host) -> None:
    async with owner(hosts):
        guards = [one for one in host.processes() if one.title == "rbee-guard"]
        assert len(guards) == 2
        guards[0].signal()
        await clean(host, KILLED)


async def test_leaving_under_a_partition_is_bounded_and_fenced(
    hosts: Hosts, host: Host, aio: Aio
) -> None:
    target = SshTarget("mac", "mac", config=hosts.ssh_config, agent="")
    try:
        async with open_connection(target, aio, lease=LEASE) as connection:
            async with open_planted(connection, "serve", ""):
                partition(host)
                began = trio.current_time()
        took = trio.current_time() - began
    finally:
        host.heal()
    assert took < GRACES[0] + 0.5 + 1.5 + 1.5
    fence = connection.fence
    assert fence.is_up
    assert fence.closed >= fence.last_beat
    assert fence.lifted_at == fence.closed + LEASE + 8
    await clean(host, SILENT)


async def test_a_flood_into_a_partition_holds_nothing_up(
    hosts: Hosts, host: Host, aio: Aio
) -> None:
    target = SshTarget("mac", "mac", config=hosts.ssh_config, agent="")
    try:
        async with open_connection(target, aio, lease=LEASE) as connection:
            async with open_planted(connection, "flood", ""):
                partition(host)
                await clean(host, SILENT)
    finally:
        host.heal()


async def test_a_partition_is_noticed_within_the_lease(hosts: Hosts, host: Host, aio: Aio) -> None:
    target = SshTarget("mac", "mac", config=hosts.ssh_config, agent="")
    try:
        async with open_connection(target, aio, lease=LEASE) as connection:
            async with open_planted(connection, "serve", "") as daemon:
                partition(host)
                with trio.fail_after(LEASE + 2), pytest.raises(ConnectionLostError):
                    await daemon.wait()
    finally:
        host.heal()
    await clean(host, SILENT)


async def test_a_partition_while_it_starts_leaves_nothing(
    hosts: Hosts, host: Host, aio: Aio
) -> None:
    target = SshTarget("mac", "mac", config=hosts.ssh_config, agent="")
    for after in (0.05, 0.15, 0.3, 0.6):
        try:
            with trio.move_on_after(after) as scope:
                async with open_connection(target, aio, lease=LEASE) as connection:
                    async with trio.open_nursery() as nursery:

                        async def cut(at: float = scope.deadline) -> None:
                            await trio.sleep_until(at - 0.01)
                            partition(host)

                        nursery.start_soon(cut)
                        async with open_planted(connection, "serve", ""):
                            await trio.sleep_forever()
        finally:
            host.heal()
        await clean(
            host, 8 + 8 + KILLED
        )  # the loader's alarm and the boot's, if it came no further
