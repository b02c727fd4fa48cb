"""An engine of your own: this one answers in capital letters.

    pip install ./examples/shout_engine
    rbee-keeper infer --engine shout --model loud --prompt "hello bees"

`rbee.worker.engine` says what an engine has to do. It gets the worker's HTTP, its process, and the
guarantee for nothing.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import trio

from rbee.errors import BadInputError
from rbee.model import WorkerSpec
from rbee.wire.messages import ExecuteRequest
from rbee.worker.engine import Chunk, Progress


class Shouting:
    """One request."""

    def __init__(self, words: list[str], limit: int) -> None:
        self.tokens_in = len(words)
        self._words = words[:limit]
        self._finish = "length" if len(words) > limit else "stop"

    async def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        for index, word in enumerate(self._words):
            await trio.sleep(0.01)
            is_last = index == len(self._words) - 1
            text = word.upper() if index == 0 else f" {word.upper()}"
            yield [Chunk(text, 1, self._finish if is_last else None)]


class ShoutEngine:
    """One loaded model; here there is nothing to load."""

    context = 1000
    slots = 0  # nobody has to wait for another
    app = None

    def __init__(self) -> None:
        self._running = 0

    def running(self) -> int:
        return self._running

    def metrics(self) -> str:
        return ""

    @asynccontextmanager
    async def generate(self, request: ExecuteRequest) -> AsyncGenerator[Shouting, None]:
        said = request.prompt or " ".join(one.content for one in request.messages or ())
        if not said.split():
            raise BadInputError("the prompt is empty")
        self._running += 1
        try:
            yield Shouting(said.split(), request.max_tokens or self.context)
        finally:
            self._running -= 1

    async def wait_dead(self) -> str:
        return await trio.sleep_forever()


class ShoutEngineKind:
    """How workers with this engine come into being; the entry point names it."""

    name = "shout"
    needs_model = False

    def preload(self) -> None:
        """Import what takes long; the zygote does so once for all workers."""

    def check(self, spec: WorkerSpec) -> None:
        if spec.backend != "cpu":
            raise BadInputError(f"the shout engine runs on cpu only, not on {spec.backend!r}")

    @asynccontextmanager
    async def open(
        self, spec: WorkerSpec, *, run_dir: str, progress: Progress
    ) -> AsyncGenerator[ShoutEngine, None]:
        progress("voice", 1.0)
        yield ShoutEngine()
