"""A cluster inside a program of somebody else's."""

from __future__ import annotations

import trio

from rbee.cluster import open_cluster
from rbee.home import Home
from rbee.testing.processes import LeakCheck
from rbee.wire.messages import TaskRequest, Token


async def test_a_cluster_answers_in_the_callers_nursery_and_leaves_nothing(
    home: Home, leaks: LeakCheck
) -> None:
    with trio.fail_after(30):
        async with open_cluster(models=["echo?rate=2000"], engine="echo") as cluster:
            leaks.tree.refresh()
            task = TaskRequest("echo?rate=2000", prompt="one two", max_tokens=4)
            async with cluster.client.stream(task) as events:
                text = "".join([e.t async for e in events if isinstance(e, Token)])
    assert text == "one two one two"
    assert leaks.find() == []
