"""The hive: the pool manager of one node."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial

import httpx
import trio

from rbee import __version__, daemon
from rbee.errors import RbeeError
from rbee.hive.app import make_app
from rbee.hive.launch import fork_or_exec
from rbee.hive.models import memory_of, provisioner
from rbee.hive.owners import Owners
from rbee.hive.pulse import Pulse
from rbee.hive.workers import HiveSetup, Workers
from rbee.hive.zygotes import Child, Zygotes
from rbee.process import own_environment
from rbee.scopes import TaskOwner, open_service
from rbee.sweep import claim, retire, sweep_abandoned
from rbee.web.client import call, open_client
from rbee.web.listener import open_listener, url_of
from rbee.web.server import serve_http
from rbee.wire import messages
from rbee.wire.messages import Hello, WorkerInfo, WorkerReady

log = logging.getLogger(__name__)


async def serve(
    setup: HiveSetup,
    *,
    stop: Callable[[str], None],
    ahead: Mapping[str, Child] | None = None,
    task_status: trio.TaskStatus[Hello] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a hive until cancelled; ``task_status`` receives what it says to its owner.

    Args:
        ahead: the zygotes that there are already.

    Raises:
        ConflictError: its port is taken and must not be another one.
    """
    nonce = daemon.ensure_nonce()
    listener = open_listener(setup.host, setup.port, exact=setup.exact_port)
    await sweep_abandoned(setup.home.run, setup.run_dir)
    zygotes = Zygotes(setup.home.log_file, own_environment(setup.home.root, nonce), ahead)
    workers = Workers(
        setup,
        fork_or_exec(zygotes.get),
        provisioner(setup),
        zygotes.warm_up,
        memory=memory_of(setup),
    )
    workers.url = url_of(listener)
    owners = Owners(workers.stop_owned_by)
    callbacks = ReadyCallbacks(setup, owners)
    pulse = Pulse(setup, workers)
    serving = partial(
        serve_http, make_app(setup, workers, owners, pulse, stop), listener, grace=0.5
    )
    # Zygotes outlive the workers' orderly end, and HTTP their last news and answers.
    async with (
        zygotes.open(),
        open_service(serving) as url,
        workers.open(),
        owners.open(),
        callbacks.open(),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(pulse.keep_beating)
        workers.on_ready = callbacks.send
        task_status.started(
            Hello("hive", setup.id, __version__, os.getpid(), url, {"node": setup.node})
        )
        await trio.sleep_forever()


class ReadyCallbacks(TaskOwner):
    """Passes a worker's ready callback on to the queen that asked for it."""

    def __init__(self, setup: HiveSetup, owners: Owners) -> None:
        self._setup = setup
        self._owners = owners

    def send(self, info: WorkerInfo) -> None:
        """Send it, unless the hive is ending: no queen wants that worker any more."""
        if not self.takes_tasks:
            return
        owner = self._owners.get(info.owner)
        if owner is not None:
            self.tasks.start_soon(_post_ready, owner.lease.url, owner.lease.token, info)
        elif self._setup.queen_url:
            self.tasks.start_soon(_post_ready, self._setup.queen_url, self._setup.token, info)


async def _post_ready(url: str, token: str, info: WorkerInfo) -> None:
    message = WorkerReady(
        info.worker_id, info.url, info.model, info.backend, info.device, info.slots, info.pid
    )
    async with open_client(url, token) as client:
        try:
            await _call(client, messages.QUEEN_WORKER_READY, message)
        except RbeeError as exc:  # the hive's news tells the queen as well
            log.warning("ready callback of %s to the queen failed: %s", info.worker_id, exc)


async def _call(client: httpx.AsyncClient, path: str, message: object) -> None:
    await call(client, "POST", path, type(None), message, what="queen")


@asynccontextmanager
async def announced(setup: HiveSetup, hello: Hello) -> AsyncGenerator[None, None]:
    """Let an operator's hive be found while the body runs.

    Raises:
        ConflictError: another operator's hive of this home runs.
    """
    path = setup.home.hive_file
    with daemon.locked(path, "hive"):
        daemon.write_run_file(path, hello, setup.owner, setup.token_file or setup.home.token_file)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


async def run(
    setup: HiveSetup, root: daemon.Root, ahead: Mapping[str, Child] | None = None
) -> None:
    """Be a hive daemon: serve, say hello, be findable, until the root is cancelled."""
    if not root.owned:
        claim(setup.run_dir)
    try:
        async with trio.open_nursery() as nursery:
            hello = await nursery.start(partial(serve, setup, stop=root.stop, ahead=ahead))
            root.say_hello(hello)
            if root.owned:
                await trio.sleep_forever()
            async with announced(setup, hello):
                await trio.sleep_forever()
    finally:
        if not root.owned:
            retire(setup.run_dir)
