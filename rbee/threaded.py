"""A cluster for programs without trio: its queen runs in a thread of its own.

The thread lives from `Cluster.start` to `Cluster.close`. It is a daemon thread, so a program that
ends without `close` is not held up: its guards see it go, and end everything.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack

import trio

from rbee.blocking import Client
from rbee.cluster import AsyncCluster, ClusterOptions, open_cluster
from rbee.errors import CancelledError
from rbee.wire.messages import AddNode, StartWorker, WorkerInfo

T = TypeVar("T")


class Cluster:
    """A cluster for plain scripts and notebooks, also beside asyncio: ``with Cluster(…) as c:``.

    Entering returns when all its ``models`` are ready, leaving when nothing of it is left. Where a
    block is in the way, as in a notebook, `start` and `close` do the same.

    In a process that was forked off, leaving does nothing: the cluster is its parent's.

    Args:
        options: those of `rbee.open_cluster`.

    Raises:
        RbeeError: on entering: a node or a model is not usable, and why.
    """

    client: Client

    def __init__(self, **options: Unpack[ClusterOptions]) -> None:
        self.models = tuple(options.get("models", ()))
        self._run = _Run(options)

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> Cluster:
        """Start it, once, and return it when all its models are ready."""
        try:
            self._cluster = self._run.start()
        except BaseException:
            self.close()
            raise
        self.client = Client(self._cluster.url, self._cluster.token)
        return self

    def close(self) -> None:
        """End it, also one that is just starting, and return when nothing of it is left.

        Safe to call again, and from any thread.

        Raises:
            BaseException: whatever ended the queen before we did.
        """
        self._run.end()

    @property
    def url(self) -> str:
        """The address of its queen."""
        return self._cluster.url

    @property
    def token(self) -> str:
        """What callers of the queen must send: ``Authorization: Bearer …``."""
        return self._cluster.token

    @property
    def home(self) -> Path:
        """The directory of its configuration, registry and logs."""
        return self._cluster.queen.home

    def load(
        self, model: str, *, node: str | None = None, engine: str = "", **options: Any
    ) -> WorkerInfo:
        """Start a worker for ``model`` and return when it is ready; see `AsyncCluster.load`."""
        return self.client.start_worker(StartWorker(model, node=node, engine=engine, **options))

    def use(self, node: str | AddNode) -> None:
        """Have a hive on a node; see `AsyncCluster.use`."""
        self._run.call(self._cluster.use, node)


class _Run:
    """One thread with one `trio.run`."""

    def __init__(self, options: ClusterOptions) -> None:
        self._options = options
        self._pid = os.getpid()
        self._opened: Future[AsyncCluster] = Future()
        self._ended = threading.Event()
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="rbee-cluster", daemon=True)

    def start(self) -> AsyncCluster:
        self._thread.start()
        return self._opened.result()

    def call(self, async_fn: Callable[..., Awaitable[T]], *args: object) -> T:
        return trio.from_thread.run(async_fn, *args, trio_token=self._token)

    def end(self) -> None:
        if os.getpid() != self._pid:
            return
        self._ended.set()  # before the token is looked at: `_main` looks the other way round
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)
        if self._thread.ident is not None:
            self._thread.join()
        if (error := self._error) is not None:
            self._error = None
            raise error

    def _work(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as exc:
            self._fail(exc)
        finally:
            if not self._opened.done():
                self._opened.set_exception(CancelledError("the cluster was closed"))

    def _fail(self, exc: BaseException) -> None:
        """Tell whoever starts it, else whoever ends it."""
        if self._opened.done():
            self._error = exc
        else:
            self._opened.set_exception(exc)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        if self._ended.is_set():
            return
        with self._scope:
            async with open_cluster(**self._options) as cluster:
                self._opened.set_result(cluster)
                await trio.sleep_forever()
