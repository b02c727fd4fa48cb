"""A program that embeds a cluster, for tests that look at it or kill it; its stdout is JSON lines.

python -m tests.host_program compare|hold|fork|far|sync|forked
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from ctypes import CDLL, byref, c_int
from pathlib import Path
from typing import Any

import trio

import rbee

PR_GET_CHILD_SUBREAPER = 37
MODEL = "echo?rate=2000"
libc = CDLL(None)
hooks: list[str] = []


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


def note_fork_hooks() -> None:
    """Note which modules of ours ask to be called around a fork."""
    register = os.register_at_fork

    def noting(**given: Any) -> None:
        hooks.append(sys._getframe(1).f_globals["__name__"])
        register(**given)

    os.register_at_fork = noting


def snapshot() -> dict[str, Any]:
    """Return what is process-wide; trio's cached threads, which end by themselves, left out."""
    subreaper = c_int()
    libc.prctl(PR_GET_CHILD_SUBREAPER, byref(subreaper), 0, 0, 0)
    umask = os.umask(0)
    os.umask(umask)
    return {
        "handlers": {n: str(signal.getsignal(n)) for n in signal.valid_signals() if n != 9},
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "subreaper": subreaper.value,
        "fork hooks": [name for name in hooks if name.startswith(("rbee", "__main__"))],
        "environment": dict(os.environ),
        "policy": str(type(asyncio.get_event_loop_policy())),
        "cwd": str(Path.cwd()),
        "umask": umask,
        "title": Path("/proc/self/cmdline").read_bytes().hex(),
        "name": Path("/proc/self/comm").read_text(),
        "handlers of the log": [str(h) for h in logging.getLogger().handlers],
        "level of the log": logging.getLogger().level,
        "hooks": [str(hook) for hook in (sys.excepthook, threading.excepthook, sys.unraisablehook)],
        "limits": Path("/proc/self/limits").read_text(),
        "threads": sorted(
            t.name for t in threading.enumerate() if not t.name.startswith("Trio thread")
        ),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
    }


def open_files() -> list[str]:
    """Return what each descriptor is open on, without the numbers that differ each time."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that the listing itself had open
            found.append(str(path.readlink()).partition(":[")[0])
    return sorted(found)


async def compare() -> None:
    """Look before, inside and after a cluster that has answered."""
    await rbee_once()  # imports, and caches of libraries
    before, files = snapshot(), open_files()
    async with rbee.open_cluster(models=[MODEL], engine="echo") as cluster:
        await cluster.client.infer(MODEL, "one", max_tokens=1)
        inside = snapshot()
    say({"before": before, "inside": inside, "after": snapshot()})
    say({"before": files, "after": open_files()})


async def rbee_once() -> None:
    async with rbee.open_cluster():
        pass


async def hold() -> None:
    """Have a cluster until killed."""
    async with rbee.open_cluster(models=[MODEL], engine="echo", lease=3) as cluster:
        say(str(cluster.queen.home))
        await trio.sleep_forever()


async def fork() -> None:
    """Fork a child that keeps all our descriptors and outlives us."""
    async with rbee.open_cluster(models=[MODEL], engine="echo", lease=3) as cluster:
        child = os.fork()
        if not child:
            sleep_for_ever()
        say([str(cluster.queen.home), child])
        await trio.sleep_forever()


async def far() -> None:
    """Have a worker on another machine until killed."""
    async with rbee.open_cluster(nodes=["linux"], engine="echo", lease=3) as cluster:
        await cluster.load(MODEL, node="linux")
        answer = await cluster.client.infer(MODEL, "one two", max_tokens=2)
        say([answer.node, answer.text])
        await trio.sleep_forever()


def sleep_for_ever() -> None:
    while True:
        time.sleep(60)


def sync() -> None:
    """Have a cluster in a thread until killed or interrupted."""
    with rbee.Cluster(models=[MODEL], engine="echo", lease=3) as cluster:
        say(str(cluster.home))
        time.sleep(60)


def forked() -> None:
    """Leave the block in a child as well; the cluster is ours alone."""
    with rbee.Cluster(models=[MODEL], engine="echo", lease=3) as cluster:
        child = os.fork()
        if not child:
            return
        status = os.waitpid(child, 0)[1]
        say([status, cluster.client.infer(MODEL, "one two", max_tokens=2).text])


if __name__ == "__main__":
    note_fork_hooks()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mode = sys.argv[1]
    if mode in ("sync", "forked"):
        {"sync": sync, "forked": forked}[mode]()
    else:
        trio.run({"compare": compare, "hold": hold, "fork": fork, "far": far}[mode])
