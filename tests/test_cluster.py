"""A cluster inside a program of somebody else's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import rbee
from rbee import AsyncClient, Client, StartWorker, open_cluster
from rbee.client import KEEP_A_QUEEN
from rbee.errors import (
    BadInputError,
    CancelledError,
    ChildExitedError,
    ConflictError,
    NotFoundError,
    OwnerGoneError,
)
from rbee.guard import children
from rbee.home import Home, find_home
from rbee.model import NodeName
from rbee.nodes.node import Node
from rbee.nodes.store import NodeStore
from rbee.testing.processes import LeakCheck, read_environ, title_of
from rbee.wire.messages import Narration, Token, UpdateNode
from tests.trees import wait_for

pytestmark = pytest.mark.slow

MODEL = "echo?rate=2000"


async def test_clusters_answer_in_the_callers_nursery_and_leave_nothing(leaks: LeakCheck) -> None:
    texts: dict[str, str] = {}

    async def ask(name: str) -> None:
        async with open_cluster(models=[MODEL], engine="echo") as cluster:
            leaks.tree.refresh()
            answer = await cluster.client.infer(MODEL, f"{name} two", max_tokens=3)
            texts[cluster.url] = answer.text

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "one")
            nursery.start_soon(ask, "three")
    assert sorted(texts.values()) == ["one two one", "three two three"]
    assert leaks.find() == []


async def test_jobs_go_on_without_their_readers_until_they_are_cancelled() -> None:
    async with open_cluster(models=["echo?rate=20"], engine="echo") as cluster:
        client = cluster.client
        long = await client.enqueue("echo?rate=20", "one two", max_tokens=2000)
        short = await client.enqueue("echo?rate=20", "one two", max_tokens=4)
        async with long.events() as events:
            async for text in events.text():
                assert text.strip() == "one"
                break
        assert (await short.result()).text == "one two one two"
        async for event in long.events(events.last_seen):
            assert isinstance(event, Token)
            assert event.i == 2
            break
        info = await long.status()
        assert (info.state, info.attached, info.node) == ("started", False, "localhost")
        assert (info.tokens_out or 0) >= 4
        await long.cancel()
        with pytest.raises(CancelledError):
            await long.result()
        worker = (await client.workers())[0].worker_id
        assert [job.worker_id for job in await client.jobs()] == [worker, worker]


async def test_a_script_asks_a_queen_all_that_a_trio_program_does(home: Home) -> None:
    await NodeStore.of(home).add(Node(NodeName("mac"), host="mac.example"))
    async with open_cluster(models=[MODEL], engine="echo", home=home.root) as cluster:
        client = Client(cluster.url, cluster.token)
        await trio.to_thread.run_sync(ask_of_nodes, client)
        await trio.to_thread.run_sync(ask_of_workers, client)
        await trio.to_thread.run_sync(ask_of_jobs, client)
        with pytest.raises(ConflictError, match="part of a program"):
            await trio.to_thread.run_sync(client.shutdown)


def ask_of_nodes(client: Client) -> None:
    assert client.node("localhost") == client.nodes()[0]
    changed = client.update_node("mac", UpdateNode(user="bee"))
    assert (changed.host, changed.user) == ("mac.example", "bee")
    assert client.node("mac").user == "bee"
    client.remove_node("mac")
    with pytest.raises(NotFoundError, match="mac"):
        client.node("mac")


def ask_of_workers(client: Client) -> None:
    slow = StartWorker("echo?load=30", engine="echo")
    best = client.explain_start(slow)[0]
    assert (best.node, best.suits) == ("localhost", "room")
    started = client.start_worker(slow, wait=False)
    assert started.state != "ready"
    assert started.worker_id in [worker.worker_id for worker in client.workers()]
    client.stop_worker(started.worker_id)
    told: list[Narration] = []
    assert client.start_worker(StartWorker("echo", engine="echo"), told.append).state == "ready"
    assert told


def ask_of_jobs(client: Client) -> None:
    job = client.enqueue(MODEL, "one two", max_tokens=3)
    with client.job_events(job.id, last_seen=0) as events:
        assert list(events.text()) == list(client.job_events(job.id).text())
    assert client.job_status(job.id) == job.status()
    client.cancel_job(job.id)


async def test_a_queen_alone_is_a_task_among_others() -> None:
    async with trio.open_nursery() as nursery:
        queen = await nursery.start(rbee.serve_queen)
        assert (await queen.client().health()).component == "queen"
        assert queen.home.exists()
        nursery.cancel_scope.cancel()
    assert not queen.home.exists()


async def test_its_first_hive_forks_the_zygote_and_the_next_starts_as_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # it tells an executed zygote
    async with open_cluster(models=[MODEL], engine="echo") as cluster:
        (first,) = await cluster.client.hives()
        assert not was_executed(first.pid)
        await cluster.client.stop_hive()
        assert (await cluster.client.infer(MODEL, "one two", max_tokens=2)).text == "one two"
        (second,) = await cluster.client.hives()
        assert second.pid != first.pid
        assert was_executed(second.pid)


def was_executed(hive: int) -> bool:
    (zygote,) = children(hive)
    return b"OMP_NUM_THREADS=1" in read_environ(zygote).split(b"\0")


async def test_why_its_first_hive_does_not_start_is_told_bare(
    leaks: LeakCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBEE_MEMORY", "plenty")
    with pytest.raises(ChildExitedError, match="hive-localhost ended unasked") as caught:
        async with open_cluster(models=[MODEL], engine="echo"):
            pass
    assert "plenty" in caught.value.details["log"]
    assert leaks.find() == []


async def test_what_the_body_raises_comes_out_as_it_is() -> None:
    for error in (ValueError("mine"), ExceptionGroup("mine", [ValueError("in it")])):
        cause = KeyError("cause")
        with pytest.raises(type(error)) as caught:
            async with open_cluster():
                raise error from cause
        assert caught.value is error
        assert error.__cause__ is cause


async def test_a_model_that_cannot_be_loaded_is_told_bare_and_nothing_is_left(
    leaks: LeakCheck,
) -> None:
    with trio.fail_after(30), pytest.raises(BadInputError, match="no 'x'"):
        async with open_cluster(models=["echo?x=1"], engine="echo"):
            pass
    assert leaks.find() == []


async def test_a_node_that_nobody_knows_is_told() -> None:
    with pytest.raises(NotFoundError, match="far"):
        async with open_cluster(nodes=["far"]):
            pass


async def test_the_queen_of_a_home_is_found_there_and_is_its_only_one(home: Home) -> None:
    async with open_cluster(home=home.root) as cluster:
        found = AsyncClient(home=home.root)
        assert (found.url, found.token) == (cluster.url, cluster.token)
        assert (await found.health()).home == str(home.root)
        with pytest.raises(ConflictError, match="runs already"):
            async with open_cluster(home=home.root):
                pass
        with pytest.raises(ConflictError, match="part of a program"):
            await found.shutdown()
    assert sorted(path.name for path in home.run.iterdir()) == ["queen.lock"]


async def test_a_stream_that_outlives_the_cluster_is_told_why(leaks: LeakCheck) -> None:
    slow = "echo?rate=5"
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            read = trio.Event()

            async def reader(client: AsyncClient) -> None:
                pieces = client.stream(slow, "a b", max_tokens=400).text()
                assert await anext(pieces)
                read.set()
                with pytest.raises(OwnerGoneError) as caught:
                    await collect(pieces)
                assert caught.value.hint in (KEEP_A_QUEEN, "rbee-keeper queen start")

            async with open_cluster(models=[slow], engine="echo") as cluster:
                nursery.start_soon(reader, cluster.client)
                await read.wait()
    assert leaks.find() == []


async def collect(pieces: AsyncIterator[str]) -> str:
    return "".join([piece async for piece in pieces])


# the program around it ------------------------------------------------------------------------
@asynccontextmanager
async def open_program(
    mode: str, env: dict[str, str] | None = None
) -> AsyncGenerator[tuple[subprocess.Popen[str], Any], None]:
    """Run `tests.host_program` and yield it with the first thing that it says."""
    argv = [sys.executable, "-m", "tests.host_program", mode]
    popen = subprocess.Popen(
        argv, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
        start_new_session=True, env=env,
    )  # fmt: skip
    assert popen.stdout is not None
    try:
        with trio.fail_after(30):
            yield popen, json.loads(await trio.to_thread.run_sync(popen.stdout.readline))
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()


async def test_nothing_of_the_program_around_it_is_changed(leaks: LeakCheck) -> None:
    async with open_program("compare") as (popen, seen):
        assert popen.stdout is not None
        files = json.loads(popen.stdout.readline())
        assert popen.wait() == 0
    own = {key: seen["inside"].pop(key) for key in ("children",)}
    assert own["children"]  # the guards of its hive
    assert seen["before"].pop("children") == seen["after"].pop("children")
    assert seen["inside"] == seen["before"]
    assert seen["after"] == seen["before"]
    assert files["after"] == files["before"]


@pytest.mark.parametrize("mode", ["hold", "sync"])
async def test_a_program_that_is_killed_leaves_nothing(mode: str, leaks: LeakCheck) -> None:
    async with open_program(mode) as (popen, place):
        leaks.tree.refresh(popen.pid)
        popen.kill()
        await leaks.wait_clean(3)
        await until_gone(place, 3)


async def test_a_program_that_is_killed_while_its_first_hive_starts_leaves_nothing(
    leaks: LeakCheck,
) -> None:
    code = "import rbee; rbee.Cluster(models=['echo'], engine='echo').start()"
    with subprocess.Popen([sys.executable, "-c", code]) as program:
        await trio.to_thread.run_sync(wait_for, lambda: has_a_guard(program.pid))
        leaks.tree.refresh(program.pid)
        program.kill()
    await leaks.wait_clean(3)


def has_a_guard(pid: int) -> bool:
    return any("guard" in title_of(child) for child in children(pid))


async def test_a_program_that_has_forked_and_is_killed_leaves_nothing(leaks: LeakCheck) -> None:
    async with open_program("fork") as (popen, (place, child)):
        leaks.tree.refresh(popen.pid)
        popen.kill()
        try:
            await leaks.wait_clean(6, spare=[child])
            await until_gone(place, 3)
        finally:
            os.kill(child, signal.SIGKILL)
        await leaks.wait_clean(3)


async def test_an_interrupted_script_leaves_nothing(leaks: LeakCheck) -> None:
    async with open_program("sync") as (popen, place):
        leaks.tree.refresh(popen.pid)
        popen.send_signal(signal.SIGINT)
        await trio.to_thread.run_sync(popen.wait)
        assert leaks.find() == []
        assert not Path(place).exists()


async def test_a_forked_child_that_leaves_the_block_ends_nothing(leaks: LeakCheck) -> None:
    async with open_program("forked") as (popen, said):
        assert said == [0, "one two"]
        assert await trio.to_thread.run_sync(popen.wait) == 0
    assert leaks.find() == []


async def until_gone(place: str, within: float) -> None:
    """Wait for the home of a cluster, and its run directory, to be removed."""
    with trio.fail_after(within):
        while Path(place).exists() or find_home(place).run.exists():  # noqa: ASYNC110
            await trio.sleep(0.05)


# the face -------------------------------------------------------------------------------------
def test_every_name_of_the_library_is_there_and_they_fit_one_screen() -> None:
    assert all(getattr(rbee, name) is not None for name in rbee.__all__)
    assert len(rbee.__all__) <= 24
    assert dir(rbee) == rbee.__all__


def test_importing_the_library_imports_nothing_of_it() -> None:
    code = "import sys, rbee, rbee.testing.plugin; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    loaded = done.stdout.decode().split()
    assert [name for name in loaded if name.partition(".")[0] in ("trio", "httpx", "attr")] == []
    ours = [name for name in loaded if name.startswith("rbee.")]
    assert ours == ["rbee.testing", "rbee.testing.plugin"]


def test_what_starts_the_hive_imports_nothing_that_a_queen_is_made_of() -> None:
    code = "import sys, rbee.threaded; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    loaded = done.stdout.decode().split()
    heavy = {"rbee.queen.daemon", "rbee.queen.hives", "httpx", "hypercorn", "asyncio"}
    assert heavy.isdisjoint(loaded)
