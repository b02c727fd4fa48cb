"""A small queen: real HTTP on loopback, scripted answers, a run file like the real one's.

Run as a program it stands in for ``python -m rbee.queen`` where a process is needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import trio

from rbee import __version__, guard
from rbee.errors import ConflictError, MachineError, NotFoundError
from rbee.home import Home, open_home, write_atomic
from rbee.web.listener import open_listener
from rbee.web.router import App, Emit, Request, Response, Stream, json_response
from rbee.web.server import serve_http
from rbee.wire import codec, messages, sse

TOKEN = "secret"
WORKER = messages.WorkerInfo(
    "worker-1", "echo", "ready", url="http://127.0.0.1:8001", engine="echo"
)
HIVE = messages.HiveInfo(
    "localhost", "hive-1", "http://127.0.0.1:9200", "ready", "queen-1", 0, __version__
)


def answer(*words: str) -> list[object]:
    """Script a good answer."""
    tokens = [messages.Token(word, number + 1) for number, word in enumerate(words)]
    return [
        messages.Queued("job-1", 0),
        messages.Narration("hive", "worker", "starting a worker"),
        messages.Started("job-1", "worker-1", "localhost", "echo"),
        *tokens,
        messages.End(3, len(tokens), "stop", 1.5, 9.5),
    ]


@attrs.define(eq=False)
class FakeQueen:
    """``script``: events of the next jobs; a number is a pause, ``None`` waits for ever."""

    script: list[object] = attrs.field(factory=lambda: answer("Hello", " ", "world"))
    owner: str = "operator"
    version: str = __version__
    state: str = "ready"
    home: str = ""
    silent: bool = False
    models: list[messages.ModelInfo] = attrs.field(factory=list)
    pulls: list[messages.PullModel] = attrs.field(factory=list)
    removed: list[str] = attrs.field(factory=list)
    tasks: list[messages.TaskRequest] = attrs.field(factory=list)
    cancelled: trio.Event = attrs.field(factory=trio.Event)
    stopping: trio.Event = attrs.field(factory=trio.Event)
    workers: dict[str, messages.WorkerInfo] = attrs.field(factory=lambda: {"worker-1": WORKER})
    hives: dict[str, messages.HiveInfo] = attrs.field(factory=lambda: {"localhost": HIVE})
    starts: list[messages.StartWorker] = attrs.field(factory=list)
    failure: messages.Error | None = None  # of the next worker
    stuck: set[str] = attrs.field(factory=set)  # those that do not end
    before_stop: Callable[[], None] = lambda: None

    def app(self, token: str = TOKEN) -> App:
        app = App(token=token)
        app.add("GET", messages.HEALTH, self._health, is_open=True)
        app.add("POST", messages.TASKS, self._task)
        app.add("GET", messages.QUEEN_NODES, self._nodes)
        app.add("GET", messages.QUEEN_WORKERS, partial(self._list, self.workers))
        app.add("POST", messages.QUEEN_WORKERS, self._start_worker)
        app.add("POST", messages.QUEEN_EXPLAIN, self._explain)
        app.add("DELETE", messages.QUEEN_WORKERS + "/{name}", partial(self._drop, self.workers))
        app.add("GET", messages.QUEEN_HIVES, partial(self._list, self.hives))
        app.add("POST", messages.QUEEN_HIVES, self._start_hive)
        app.add("DELETE", messages.QUEEN_HIVES + "/{name}", self._stop_hive)
        app.add("GET", messages.QUEEN_MODELS, self._models)
        app.add("POST", messages.QUEEN_MODELS, self._pull)
        app.add("DELETE", messages.QUEEN_MODELS + "/{node}/{model}", self._remove)
        app.add("POST", messages.SHUTDOWN, self._shutdown)
        return app

    async def _health(self, _: Request) -> Response:
        if self.silent:
            await trio.sleep_forever()
        return json_response(
            messages.Health(
                "queen", "queen-1", self.version, self.owner, self.home, os.getpid(), self.state
            )
        )

    async def _task(self, request: Request) -> Stream:
        self.tasks.append(await request.read(messages.TaskRequest))
        return Stream(self._play, ((messages.JOB_ID_HEADER.encode(), b"job-1"),))

    async def _models(self, _: Request) -> Response:
        return json_response(self.models)

    async def _pull(self, request: Request) -> Stream:
        self.pulls.append(await request.read(messages.PullModel))
        return Stream(self._play)

    async def _remove(self, request: Request) -> Response:
        self.removed.append("/".join(request.params.values()))
        return Response(status=204)

    async def _play(self, emit: Emit) -> None:
        try:
            for step in self.script:
                if step is None:
                    await trio.sleep_forever()
                elif isinstance(step, int | float):
                    await trio.sleep(step)
                else:
                    await emit(sse.encode(step))
        except trio.Cancelled:
            self.cancelled.set()
            raise

    async def _nodes(self, _: Request) -> Response:
        return json_response([{"name": "localhost"}])

    async def _list(self, items: dict[str, object], _: Request) -> Response:
        return json_response(list(items.values()))

    async def _drop(self, items: dict[str, object], request: Request) -> Response:
        if items.pop(request.params["name"], None) is None:
            raise NotFoundError("no such thing")
        if request.params["name"] in self.stuck:
            raise MachineError("it does not end", code="stuck")
        return Response(status=204)

    async def _start_worker(self, request: Request) -> Response | Stream:
        body = await request.read(messages.StartWorker)
        self.starts.append(body)
        info = attrs.evolve(WORKER, worker_id=f"worker-{len(self.workers) + 1}", model=body.model)
        self.workers[info.worker_id] = info
        if not request.accepts_events():
            return json_response(attrs.evolve(info, state="started"), 202)

        async def run(emit: Emit) -> None:
            await emit(sse.encode(messages.Narration("hive", "load", "a model")))
            await emit(sse.encode(self.failure or info))

        return Stream(run)

    async def _explain(self, request: Request) -> Response:
        body = await request.read(messages.StartWorker)
        return json_response(
            [
                messages.NodeChoice("mac", "on_disk", f"{body.model} is on its disk"),
                messages.NodeChoice("localhost", "no", "no cuda device 0 (it has none)"),
            ]
        )

    async def _start_hive(self, request: Request) -> Stream:
        body = await request.read(messages.StartHive)
        info = attrs.evolve(HIVE, node=body.node, hive_id="hive-2")
        is_new = body.node not in self.hives

        async def run(emit: Emit) -> None:
            if is_new:
                await emit(sse.encode(messages.Narration("queen", "start", "a hive")))
            await emit(sse.encode(self.hives.setdefault(body.node, info)))

        return Stream(run)

    async def _stop_hive(self, request: Request) -> Response:
        hive = self.hives.get(request.params["name"])
        if hive is not None and hive.owner == "operator":
            raise ConflictError("an operator's", code="not_owned", hint="kill 7")
        self.hives.pop(request.params["name"], None)
        return Response(status=204)

    async def _shutdown(self, _: Request) -> Response:
        self.before_stop()
        self.stopping.set()
        return Response(status=202)


@asynccontextmanager
async def open_fake(
    queen: FakeQueen | None = None, home: Home | None = None
) -> AsyncGenerator[tuple[FakeQueen, str], None]:
    """Serve a fake queen while the body runs; with a home it is the home's running queen."""
    queen = queen or FakeQueen()
    async with trio.open_nursery() as nursery:
        listener = open_listener("127.0.0.1", 0, exact=True)
        url = await nursery.start(partial(serve_http, queen.app(), listener, grace=0.1))
        if home is not None:
            queen.home = queen.home or str(home.root)
            note(home, queen, url)
        try:
            yield queen, url
        finally:
            nursery.cancel_scope.cancel()


def note(home: Home, queen: FakeQueen, url: str, pid: int = 0) -> None:
    """Write the home's run file and token for this queen."""
    pid = pid or os.getpid()
    token_file = home.token_file if queen.owner == "operator" else home.run / "queen.token"
    record = messages.RunFile(
        "queen", "queen-1", url, pid, guard.start_time(pid), guard.boot_id(), queen.version,
        queen.owner, str(token_file),
    )  # fmt: skip
    write_atomic(home.queen_file, codec.dumps(record).decode())
    write_atomic(token_file, TOKEN + "\n")


async def _main(home: Home) -> None:
    """Stand as the operator's queen of ``home`` until told to stop."""
    queen = FakeQueen(script=answer("one", " ", "two"))
    async with open_fake(queen, home):
        await queen.stopping.wait()
        await trio.sleep(0.1)


if __name__ == "__main__":
    trio.run(_main, open_home(Path(sys.argv[1])))
