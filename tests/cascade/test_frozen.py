"""A process that does not answer is told of as such, and not killed for it; and who goes first."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from rbee.client import AsyncClient
from rbee.guard import send_signal
from rbee.home import Home
from rbee.testing.processes import (
    Identity,
    LeakCheck,
    Tree,
    ancestors,
    carriers,
    identify,
    is_running,
    scan,
    title_of,
)
from tests.cascade.keeper import infer, run

pytestmark = pytest.mark.slow

SHOWS_WITHIN = 15.0  # seconds: two probes of five, one of them waited out
GUARD_TITLES = ("rbee-guard", "guard.py")


@pytest.fixture
async def queen(home: Home, nonce: str, leaks: LeakCheck) -> AsyncGenerator[AsyncClient, None]:
    """Talk to an operator's queen with a hive of its own and one warm echo worker."""
    started = run("queen", "start", "--port", "0")
    assert started.code == 0, started.err
    assert leaks.tree is not None
    leaks.tree.refresh(*carriers(nonce))
    answered = infer("echo")
    assert answered.code == 0, answered.err
    async with AsyncClient(started.out.strip(), home.token_file.read_text().strip()) as client:
        yield client
    leaks.tree.refresh(*carriers(nonce))
    stopped = run("queen", "stop")
    assert stopped.code == 0, stopped.err
    await leaks.wait_clean(10)


@contextmanager
def frozen(pid: int, title: str) -> Iterator[None]:
    """Stop a process while the body runs."""
    assert title_of(pid).startswith(title), title_of(pid)
    one = identify(pid)
    assert one is not None
    assert send_signal(one.pid, one.start, signal.SIGSTOP)
    try:
        yield
    finally:
        send_signal(one.pid, one.start, signal.SIGCONT)


async def until_state(state: str, look: Callable[[], Awaitable[str]]) -> None:
    with trio.fail_after(SHOWS_WITHIN):
        while await look() != state:  # noqa: ASYNC110  # nobody sends news of it
            await trio.sleep(0.1)


def all_below(pid: int) -> list[Identity]:
    with Tree(pid) as tree:
        return list(tree.noted)


async def test_a_frozen_worker_and_a_frozen_hive_are_unresponsive_until_they_go_on(
    queen: AsyncClient,
) -> None:
    async def state_of_worker() -> str:
        (worker,) = await queen.workers()
        return worker.state

    async def state_of_hive() -> str:
        (hive,) = await queen.hives()
        return hive.state

    (worker,), (hive,) = await queen.workers(), await queen.hives()
    await check_frozen(worker.pid, "llm-worker-rbee", state_of_worker)
    await check_frozen(hive.pid, "rbee-hive", state_of_hive)


async def check_frozen(pid: int, title: str, state: Callable[[], Awaitable[str]]) -> None:
    """Freeze a process until that is told, and let it go on; nothing below it may end."""
    before = all_below(pid)
    with frozen(pid, title):
        await until_state("unresponsive", state)
        assert all(is_running(one) for one in before)
    await until_state("ready", state)
    assert all(is_running(one) for one in before)


async def test_the_kernel_out_of_memory_takes_a_worker_and_no_guard(
    queen: AsyncClient,
) -> None:
    (worker,) = await queen.workers()
    (pid,) = [one.pid for one in all_below(worker.pid) if title_of(one.pid) == "llm-worker-rbee"]
    line = [pid, *ancestors(pid, scan())]
    found = [(title_of(one).split()[0].rstrip(":"), oom_score(one)) for one in line]
    assert [score for title, score in found if title == "llm-worker-rbee"] == [500], found
    assert [score for title, score in found if title == "rbee-zygote"] == [500], found
    guards = [one for one in line if any(name in title_of(one) for name in GUARD_TITLES)]
    assert len(guards) == 3  # the worker's, and the hive's two
    assert {oom_score(one) for one in guards} == {oom_score(os.getpid())}, found


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
