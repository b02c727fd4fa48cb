"""Workers forked from a real zygote: who dies with whom, and what the hive hears of it."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from rbee import guard
from rbee.errors import ChildExitedError, NotFoundError
from rbee.hive import zygote as protocol
from rbee.hive.launch import fork_or_exec
from rbee.hive.zygote import unsafe_threads
from rbee.hive.zygotes import CannotForkError, Zygotes
from rbee.model import Grace, WorkerConfig, WorkerId, WorkerSpec, new_id
from rbee.process import Process, own_environment
from rbee.testing.processes import LeakCheck, count_titles, title_of
from tests.test_process import CancelAt
from tests.trees import STUBBORN, alive, holders, kill, wait_for

slow = pytest.mark.slow
PR_SET_NAME = 15


@attrs.define
class Node:
    """Real zygotes below this process, and a launcher that forks from them."""

    leaks: LeakCheck
    zygotes: Zygotes

    def config(self) -> WorkerConfig:
        worker_id = WorkerId(new_id("worker"))
        return WorkerConfig(
            WorkerSpec(worker_id, "words", engine="echo"),
            run_dir=str(self.leaks.home.run / worker_id), token="secret", port=0,
            grace=Grace(worker=0.5, worker_guard=1.0),
        )  # fmt: skip

    @asynccontextmanager
    async def worker(self) -> AsyncGenerator[Process, None]:
        config = self.config()
        launch = fork_or_exec(self.zygotes.get)
        async with launch(config, self.leaks.home.log_file(config.spec.id)) as process:
            yield process

    async def pid(self) -> int:
        """Return the living zygote's pid."""
        await self.zygotes.get("echo")
        return await until(lambda: self.find("rbee-zygote"))

    def find(self, title: str) -> int:
        return next((p for p in guard.children(os.getpid()) if title_of(p) == title), 0)


async def until(happened: Callable[[], Any]) -> Any:
    return await trio.to_thread.run_sync(wait_for, happened)


@asynccontextmanager
async def open_node(leaks: LeakCheck) -> AsyncGenerator[Node, None]:
    zygotes = Zygotes(leaks.home.log_file, own_environment(leaks.home.root, leaks.nonce))
    async with zygotes.open():
        yield Node(leaks, zygotes)
    assert [pid for pid in guard.children(os.getpid()) if guard.start_time(pid)] == []


async def engine_below(process: Process) -> list[int]:
    """Return worker and engine process of a guard as soon as both are there."""

    def both() -> list[int]:
        found = list(guard.descendants({process.pid: guard.start_time(process.pid)}))
        return found if len(found) == 2 else []

    return await until(both)


# a worker's life ------------------------------------------------------------------------------
@slow
async def test_workers_are_forked_below_guards_and_leave_nothing(
    leaks: LeakCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = f"hf_{leaks.nonce}_token"
    monkeypatch.setenv("HF_TOKEN", token)  # of a hive that somebody started by hand
    async with open_node(leaks) as node:
        zygote = await node.pid()
        async with node.worker() as one, node.worker() as two:
            assert await node.pid() == zygote
            for process in (one, two):
                await engine_below(process)
                assert title_of(process.pid) == "rbee-guard"
                assert process.pid in guard.children(zygote)
            titles = {"rbee-zygote": 1, "rbee-guard": 2, "llm-worker-rbee": 2, "echo-engine": 2}
            await until(lambda: count_titles(leaks.nonce) == titles)
            assert holders("environ", token) == set()
            leaks.tree.refresh(os.getpid())
        assert count_titles(leaks.nonce) == {"rbee-zygote": 1}
        assert os.listdir(leaks.home.run) == []
    await leaks.wait_clean(0.2)


@slow
async def test_a_forked_worker_holds_no_socket_of_the_zygote(leaks: LeakCheck) -> None:
    async with open_node(leaks) as node, node.worker() as process:
        zygote = await node.pid()
        ours = {link for fd, link in links(zygote) if link.startswith("socket:")}
        for pid in (process.pid, *await engine_below(process)):
            assert not ours & {link for fd, link in links(pid)}


def links(pid: int) -> list[tuple[str, str]]:
    directory = Path(f"/proc/{pid}/fd")
    return [(fd, str((directory / fd).readlink())) for fd in os.listdir(directory)]


@slow
@pytest.mark.parametrize(("victim", "status"), [("worker", 137), ("guard", 137), ("zygote", None)])
async def test_an_unasked_end_is_seen_and_leaves_nothing(
    victim: str, status: int | None, leaks: LeakCheck
) -> None:
    async with open_node(leaks) as node:
        zygote = await node.pid()
        async with node.worker() as process:
            below = await engine_below(process)
            (worker,) = guard.children(process.pid)
            kill({"worker": worker, "guard": process.pid, "zygote": zygote}[victim])
            with trio.fail_after(3):
                found = await process.wait()
            assert status in (None, found)
        assert not any(map(alive, below))
        async with node.worker() as process:  # the next one works
            assert await engine_below(process)
            assert (await node.pid() == zygote) is (victim != "zygote")
    await leaks.wait_clean(0.2)


@slow
async def test_a_frozen_zygote_does_not_hold_up_the_end(leaks: LeakCheck) -> None:
    with trio.fail_after(8):
        async with open_node(leaks) as node:
            zygote = await node.pid()
            async with node.worker() as process:
                await engine_below(process)
                leaks.tree.refresh(os.getpid())
                os.kill(zygote, signal.SIGSTOP)
    await leaks.wait_clean(0.2)


@slow
async def test_a_launch_can_be_cancelled_at_each_await(leaks: LeakCheck) -> None:
    async with open_node(leaks) as node:
        await node.pid()
        for steps in range(1, 40):
            with trio.CancelScope() as scope:
                instrument = CancelAt(scope, steps)
                trio.lowlevel.add_instrument(instrument)
                try:
                    async with node.worker():
                        await trio.lowlevel.checkpoint()
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            assert count_titles(leaks.nonce) == {"rbee-zygote": 1}
            assert os.listdir(leaks.home.run) == []
            if instrument.steps > 0:
                break
        assert 3 < steps < 39
    await leaks.wait_clean(0.2)


@slow
async def test_a_start_that_was_given_up_keeps_nobody_waiting(leaks: LeakCheck) -> None:
    for steps in range(1, 9):
        async with open_node(leaks) as node:
            with trio.CancelScope() as scope:
                instrument = CancelAt(scope, steps)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await node.zygotes.get("echo")
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            with trio.fail_after(10):
                await node.zygotes.get("echo")
        if instrument.steps > 0:
            break
    assert 1 < steps < 8


@slow
async def test_no_file_descriptor_stays_open(leaks: LeakCheck) -> None:
    async with open_node(leaks) as node:
        await node.pid()
        async with node.worker():
            pass
        before = len(os.listdir("/proc/self/fd"))
        async with node.worker():
            pass
        with trio.move_on_after(0.01):
            async with node.worker():
                await trio.sleep_forever()
        assert len(os.listdir("/proc/self/fd")) == before


@slow
async def test_an_engine_that_does_not_exist_is_a_dead_zygote(leaks: LeakCheck) -> None:
    async with open_node(leaks) as node:
        zygote = await node.zygotes.get("none")
        with pytest.raises(ChildExitedError, match="zygote of engine none died"):
            await zygote.fork({}, node.config(), 2)
    assert NotFoundError.__name__ in leaks.home.log_file("zygote-none").read_text()


@slow
async def test_a_zygotes_log_is_capped(leaks: LeakCheck) -> None:
    log_file = leaks.home.log_file("zygote-echo")
    with log_file.open("wb") as file:
        file.truncate(guard.LOG_CAP + 1)
    async with open_node(leaks) as node:
        await node.zygotes.get("echo")
        await until(lambda: log_file.stat().st_size < guard.LOG_CAP)
    assert log_file.with_name("zygote-echo.log.1").stat().st_size == guard.LOG_CAP


# where fork is no option ----------------------------------------------------------------------
@slow
async def test_a_worker_is_executed_where_it_must_not_be_forked(
    leaks: LeakCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = f"hf_{leaks.nonce}_token"
    monkeypatch.setenv("HF_TOKEN", token)

    class Refusing:
        async def fork(self, *args: object) -> Process:
            raise CannotForkError("the zygote has 2 threads")

    async def get(engine: str) -> Any:
        return Refusing()

    config = Node(leaks, Zygotes(leaks.home.log_file, {})).config()
    launch = fork_or_exec(get)
    async with launch(config, leaks.home.log_file(config.spec.id)) as process:
        await engine_below(process)
        leaks.tree.refresh(os.getpid())
        titles = {"rbee-guard": 1, "llm-worker-rbee": 1, "echo-engine": 1}
        await until(lambda: count_titles(leaks.nonce) == titles)
        assert holders("environ", token) == set()
    await leaks.wait_clean(0.2)


def test_a_process_with_threads_refuses_to_fork() -> None:
    with another_thread(), pytest.raises(RuntimeError, match="the zygote has other threads"):
        protocol.refuse_unsafe_fork()


def test_a_zygote_whose_hive_has_gone_meanwhile_answers_nobody_and_ends() -> None:
    """As one that was frozen does when it is woken."""
    hive, ours = socket.socketpair(type=socket.SOCK_SEQPACKET)
    zygote = protocol.Zygote(ours, "")
    with hive:
        fds = (hive.fileno(), hive.fileno())
        protocol.send(hive, {"config": {"spec": {"id": "worker-1"}}}, fds)
    with ours, another_thread():
        assert zygote._serve_one()
        assert not zygote._serve_one()


@contextmanager
def another_thread() -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


ORPHANS = f"""
import os, socket, subprocess, sys, time
from rbee import guard
from rbee.hive.zygote import Zygote
guard.become_subreaper()
zygote = Zygote(socket.socketpair()[0], "")
def start(*args):
    argv = [sys.executable, "-I", "-S", "-c", {STUBBORN!r}, *args]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return int(child.stdout.readline())
kept, orphan = start(), start("leave")
zygote.guards[kept] = ""
zygote._kill_orphans()
print(guard.start_time(kept) > 0, guard.start_time(orphan) > 0)
"""


@slow
def test_a_zygote_kills_what_a_killed_guard_left_and_no_guard(leaks: LeakCheck) -> None:
    argv = [sys.executable, "-c", ORPHANS]
    run = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert run.stdout == "True False\n"
    assert [found.kind for found in leaks.kill()] == ["process"]


# the protocol ---------------------------------------------------------------------------------
def test_a_message_arrives_with_its_descriptors() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        reader, writer = os.pipe()
        protocol.send(ours, {"forked": "ü"}, (writer,))
        protocol.send(ours, {"exited": 5, "status": 1})
        os.close(writer)
        space = socket.CMSG_LEN(4 * array.array("i").itemsize)
        data, ancillary, _, _ = theirs.recvmsg(protocol.MAX_MESSAGE, space)
        message, (fd,) = protocol.unpack(data, ancillary)
        assert message == {"forked": "ü"}
        os.write(fd, b"x")
        assert os.read(reader, 1) == b"x"
        data, ancillary, _, _ = theirs.recvmsg(protocol.MAX_MESSAGE, space)
        assert protocol.unpack(data, ancillary) == ({"exited": 5, "status": 1}, [])
        os.close(reader)
        os.close(fd)


# what a forked child does without -------------------------------------------------------------
@contextmanager
def thread_named(name: bytes) -> Iterator[None]:
    """Have a thread that the kernel knows by this name."""
    named, over = threading.Event(), threading.Event()

    def run() -> None:
        guard.libc.prctl(PR_SET_NAME, name, 0, 0, 0)
        named.set()
        over.wait()

    thread = threading.Thread(target=run)
    thread.start()
    named.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_only_threads_that_a_child_would_miss_are_in_the_way_of_a_fork() -> None:
    with thread_named(b"cuda00001800007"), thread_named(b"jemalloc_bg_thd"), thread_named(b"mine"):
        names = unsafe_threads()
    assert "mine" in names
    assert not {"cuda00001800007", "jemalloc_bg_thd"} & set(names)
