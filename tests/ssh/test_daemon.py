from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncssh
import attrs
import pytest
import trio

import rbee
from rbee.aio import Aio
from rbee.errors import ChildExitedError, MachineError, RbeeError
from rbee.guard import start_time
from rbee.ssh import (
    ConnectionLostError,
    NoHelloError,
    RemoteMachineError,
    RemoteProgramError,
    SshError,
    open_connection,
    open_remote_daemon,
)
from rbee.ssh.remote import LOADER, PATIENCE, Facts, Wish, _wake_after, open_remote
from tests.ssh.nodes import GRACES, LEASE, gone, open_planted, pids, start
from tests.ssh.sshd import Sshd

pytestmark = pytest.mark.slow


def early(home: str) -> Wish:
    """Make the wish of a program that lives until its guards end it."""
    nap = "import time; time.sleep(60)"
    return Wish(
        ["", "-c", nap], [3.0, 2.5], LEASE, home=home, log="x.log", run_dir="early"
    )  # fmt: skip


@attrs.define
class Hits:
    """Sends a signal to a guard that has no plan yet; ``found``: its pid and run directory."""

    number: signal.Signals
    found: list[tuple[int, Path]] = attrs.field(factory=list)

    def __call__(self, facts: Facts) -> str:
        run_dir = Path(facts.run_dir)
        pid = int((run_dir / "owner").read_text().split()[1])
        os.kill(pid, self.number)
        self.found.append((pid, run_dir))
        return ""


def resident(pid: int) -> int:
    """Return the bytes that a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def ancestors(pid: int) -> Iterator[int]:
    """Yield a process and those above it: its guards, and what sshd has for the connection."""
    while pid not in (1, os.getpid()):
        yield pid
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_a_daemon_lives_as_long_as_its_scope(sshd: Sshd, aio: Aio, node_home: str) -> None:
    with trio.fail_after(20):
        async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
            async with open_planted(connection, "serve", node_home, "a b", "$(id);'") as daemon:
                told = daemon.hello.capabilities
                run_dir = Path(told["start"]["run_dir"])
                assert told["start"]["token"] == "s3cret"
                assert told["argv"] == ["a b", "$(id);'"]
                assert all(start_time(pid) for pid in pids(daemon))
                assert (run_dir / "owner").exists()
                assert connection.fence.is_up
            await gone(*pids(daemon), within=0.5)
            assert not run_dir.exists()
            assert not connection.fence.is_up
            assert connection.fence.last_beat
    assert "hive.log" in daemon.log
    assert "stopping: asked to" in Path(daemon.log).read_text()


async def test_a_hive_is_owned_over_ssh_as_it_is_locally(
    sshd: Sshd, aio: Aio, node_home: str
) -> None:
    argv = [
        sys.executable, "-m", "rbee.hive", "daemon", "--owned", "--port", "0", "--home", node_home,
    ]  # fmt: skip
    env = {"PYTHONPATH": str(Path(rbee.__file__).parents[1]), "RBEE_NONCE": "0123456789abcdef"}
    async with open_connection(sshd.target(), aio) as connection:
        with trio.fail_after(60):
            async with open_remote_daemon(
                connection, argv, start(10), graces=(7.5, 7), log_file="hive-mac.log",
                home=node_home, env=env,
            ) as daemon:  # fmt: skip
                assert daemon.hello.component == "hive"
                assert start_time(daemon.hello.pid)
        assert not start_time(daemon.hello.pid)
        assert not connection.fence.is_up


async def test_a_daemon_is_beaten_for_longer_than_its_lease(
    sshd: Sshd, aio: Aio, node_home: str
) -> None:
    async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
        async with open_planted(connection, "serve", node_home) as daemon:
            with trio.move_on_after(LEASE + 1.5):
                await daemon.wait()
            assert start_time(daemon.hello.pid)


async def test_a_flooding_daemon_fills_no_memory_and_ends(
    sshd: Sshd, aio: Aio, node_home: str
) -> None:
    with trio.fail_after(20):
        async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
            async with open_planted(connection, "flood", node_home) as daemon:
                await trio.sleep(0.3)
                # Ours, and all between it and us; the node is this machine.
                tree = [os.getpid(), *ancestors(daemon.hello.pid)]
                before = [resident(pid) for pid in tree]
                await trio.sleep(0.7)  # in which a hundred megabytes come
                grown = [resident(pid) - had for pid, had in zip(tree, before, strict=True)]
                assert max(grown) < 4 << 20
    await gone(*pids(daemon), within=0.5)


async def test_a_guard_that_is_frozen_before_it_has_its_plan_is_woken_to_end(
    sshd: Sshd, aio: Aio, node_home: str
) -> None:
    """Nothing is below it yet that could wake it, and sshd sends no signal."""
    wish, hits = early(node_home), Hits(signal.SIGSTOP)
    async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
        async with open_remote(connection, wish, first=hits):
            ((pid, run_dir),) = hits.found
            began = trio.current_time()
        assert trio.current_time() - began < PATIENCE + 1
        assert not connection.fence.is_up
    assert not start_time(pid)
    assert not run_dir.exists()


@pytest.mark.parametrize("error", [OSError("reset"), asyncssh.Error(1, "odd"), SshError("lost")])
async def test_nothing_that_fails_while_one_is_woken_is_an_error(error: Exception) -> None:
    tried: list[str] = []

    class Broken:
        node = "mac"

        @asynccontextmanager
        async def open_channel(self, command: str, *, limit: int) -> AsyncGenerator[Any, None]:
            tried.append(command)
            raise error
            yield

    connection: Any = Broken()
    await _wake_after(0, connection, early("/nowhere"))
    assert tried == [LOADER]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
async def test_a_guard_that_is_told_to_stop_before_it_has_its_plan_leaves_nothing(
    sshd: Sshd, aio: Aio, node_home: str, number: signal.Signals
) -> None:
    hits = Hits(number)
    async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
        async with open_remote(connection, early(node_home), first=hits) as process:
            with trio.fail_after(2):
                await process.wait()
    ((pid, run_dir),) = hits.found
    assert not start_time(pid)
    assert not run_dir.exists()


async def test_an_end_nobody_asked_for_is_told_with_the_log(
    sshd: Sshd, aio: Aio, node_home: str
) -> None:
    async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
        async with open_planted(connection, "serve", node_home) as daemon:
            os.kill(daemon.hello.pid, 9)
            error = await daemon.ended(await daemon.wait())
    assert isinstance(error, ChildExitedError)
    assert "node mac" in error.message
    assert "SIGKILL" in error.message
    assert "command ended with 137" in error.details["log"]
    await gone(*pids(daemon), within=0.5)


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("exit", ChildExitedError, "code 3"),
        ("no-module", RemoteProgramError, "rbee_does_not_exist"),
        ("silent", NoHelloError, "did not say within 2 s"),
        ("nonsense", SshError, "good morning"),
        ("error", RbeeError, "node mac: no room"),
    ],
)
async def test_a_daemon_that_does_not_start_says_why(
    sshd: Sshd, aio: Aio, node_home: str, how: str, kind: type[RbeeError], says: str
) -> None:
    limit = 2.0 if how == "silent" else 30.0
    async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
        with pytest.raises(kind) as caught:
            async with open_planted(connection, how, node_home, hello_limit=limit):
                pytest.fail("it has not started")
        assert not connection.fence.is_up
    assert says in caught.value.message
    assert caught.value.hint


async def test_a_missing_program_and_an_unwritable_home_are_told(
    sshd: Sshd, aio: Aio, node_home: str, tmp_path: Path
) -> None:
    async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
        with pytest.raises(RemoteProgramError, match="no program /no/such") as caught:
            async with open_remote_daemon(
                connection, ["/no/such"], start(), graces=GRACES, log_file="l", home=node_home
            ):
                pass
        assert caught.value.hint == "rbee-keeper node install mac"
        (tmp_path / "file").touch()
        with pytest.raises(RemoteMachineError, match="Not a directory"):
            async with open_planted(connection, "serve", str(tmp_path / "file/home")):
                pass


async def test_killed_session_ends_the_daemon_at_once_and_raises(
    sshd: Sshd, aio: Aio, node_home: str
) -> None:
    async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
        async with open_planted(connection, "serve", node_home) as daemon:
            with trio.fail_after(5):
                sshd.kill_sessions()
                with pytest.raises(ConnectionLostError, match="node mac"):
                    await daemon.wait()
                assert isinstance(await connection.wait_lost(), ConnectionLostError)
    assert connection.fence.is_up
    assert connection.fence.lifted_at >= connection.fence.last_beat + LEASE + 8
    await gone(*pids(daemon), within=GRACES[0] + 1.5)


async def test_the_bodys_own_error_comes_out_plain(sshd: Sshd, aio: Aio, node_home: str) -> None:
    async with open_connection(sshd.target(), aio, lease=LEASE) as connection:
        with pytest.raises(MachineError, match="mine"):
            async with open_planted(connection, "serve", node_home):
                raise MachineError("mine")
