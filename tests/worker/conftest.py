"""A worker in this process, on real loopback HTTP, with the echo engine."""

from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio

from rbee.model import WorkerConfig, WorkerId, WorkerSpec
from rbee.web.client import open_client, open_events
from rbee.worker import daemon

TOKEN = "secret"


@attrs.frozen
class OpenWorker:
    url: str
    client: object
    scope: trio.CancelScope

    def stream(self, **body):
        body = {"job_id": "job-1", "prompt": "one two three"} | body
        return open_events(self.client, "POST", "/execute", body, what="worker")

    async def events(self, **body):
        async with self.stream(**body) as events:
            return [event async for event in events]


def make_config(run_dir, *, hive_url="", keep_alive=300.0, **engine_args):
    spec = WorkerSpec(
        WorkerId("worker-1"), "echo-model", engine="echo", node="here", engine_args=engine_args,
        keep_alive=keep_alive,
    )  # fmt: skip
    return WorkerConfig(spec, str(run_dir), TOKEN, port=0, hive_url=hive_url)


@pytest.fixture
def open_worker(tmp_path):
    @asynccontextmanager
    async def open_one(**engine_args):
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                serve = partial(daemon.serve, make_config(tmp_path, **engine_args))
                url = await nursery.start(serve)
                async with open_client(url, TOKEN) as client:
                    yield OpenWorker(url, client, nursery.cancel_scope)
                nursery.cancel_scope.cancel()

    return open_one
