"""One `/execute`: a generation as server-sent events with exactly one terminal event."""

from __future__ import annotations

import logging

import attrs
import trio

from rbee.errors import PeerError, RbeeError, leaves
from rbee.model import WorkerSpec
from rbee.web.router import Emit
from rbee.wire import sse
from rbee.wire.messages import End, Error, ExecuteRequest, Started
from rbee.worker.engine import Chunk, Engine, Generation
from rbee.worker.jobs import Job, Jobs
from rbee.worker.metrics import Figures

log = logging.getLogger(__name__)

STALL = 60.0  # seconds without a token
# Sending costs more than generating: with many streams each waits a little between two sends, so
# that one carries several tokens. Never before the first, and never so long that eyes notice.
FEW, PAUSE_PER_STREAM, LONGEST_PAUSE = 4, 0.001, 0.02


def pause_after_send(streams: int) -> float:
    return 0.0 if streams <= FEW else min(streams * PAUSE_PER_STREAM, LONGEST_PAUSE)


@attrs.define(eq=False)
class Execution:
    """Runs one request; `run` belongs to the connection and is cancelled with it."""

    engine: Engine
    request: ExecuteRequest
    spec: WorkerSpec
    jobs: Jobs
    figures: Figures
    stall: float = STALL
    _began: float = attrs.field(factory=trio.current_time)
    _awaited: float | None = attrs.field(factory=trio.current_time)
    _first: float | None = None
    _last: float = 0.0
    _tokens: int = 0
    _started: bool = False
    _outcome: str = "cancelled"

    async def run(self, emit: Emit) -> None:
        """Stream it.

        Raises:
            RbeeError: refused before generation started; afterwards errors are events.
        """
        with self.jobs.open(self.request.job_id) as job:
            try:
                await self._run_job(job, emit)
            finally:
                self.figures.jobs[self._outcome] += 1
                log.info("job %s %s, %d tokens", job.id, self._outcome, self._tokens)

    async def _run_job(self, job: Job, emit: Emit) -> None:
        error: RbeeError | None = None
        try:
            with job.scope:
                await self._generate(emit)
        except* RbeeError as group:
            error = next(leaf for leaf in leaves(group) if isinstance(leaf, RbeeError))
        except* Exception:
            log.exception("job %s failed by a bug", job.id)
            error = RbeeError("internal error, see the worker's log")
        error = job.error or error
        if error is None or self._outcome == "done":
            return
        if not self._started:
            self._outcome = "refused"
            raise error
        self._outcome = "cancelled" if error.code == "cancelled" else "failed"
        await emit(sse.encode(Error(error.code, error.message, error.hint, error.details)))

    async def _generate(self, emit: Emit) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._abort_stall, nursery.cancel_scope)
            async with self.engine.generate(self.request) as generation:
                self.figures.tokens_in += generation.tokens_in
                self._started = True
                await self._stream(generation, emit)
            nursery.cancel_scope.cancel(reason="done")
        if self._outcome != "done":
            raise PeerError(
                f"no token for {self.stall:g} s, the request was aborted", code="stalled"
            )

    async def _stream(self, generation: Generation, emit: Emit) -> None:
        spec = self.spec
        await emit(sse.encode(Started(self.request.job_id, spec.id, spec.node, spec.model)))
        async for chunks in generation:
            self._awaited = None
            await emit(self._encode(chunks, generation.tokens_in))
            if self._outcome == "done":
                return
            self._awaited = trio.current_time()
            if (pause := pause_after_send(len(self.jobs))) > 0:
                await trio.sleep(pause)
        raise PeerError("the engine ended the request without a reason", code="engine")

    async def _abort_stall(self, scope: trio.CancelScope) -> None:
        """Cancel when the engine was awaited too long; a reader that lags is no stall.

        A deadline of the scope's own would have to be moved twice for every token.
        """
        while True:
            since = trio.current_time() if self._awaited is None else self._awaited
            left = since + self.stall - trio.current_time()
            if left <= 0:
                return scope.cancel(reason="stalled")
            await trio.sleep(left)

    def _encode(self, chunks: list[Chunk], tokens_in: int) -> bytes:
        now = trio.current_time()
        if self._first is None:
            self._first = now
            self.figures.firsts.observe(now - self._began)
        else:
            self.figures.gaps.observe(now - self._last)
        self._last = now
        parts = []
        for chunk in chunks:
            self._tokens += chunk.tokens
            self.figures.tokens_out += chunk.tokens
            if chunk.text:
                parts.append(sse.encode_token(chunk.text, self._tokens))
            if chunk.finish is not None:
                self._outcome = "done"
                parts.append(sse.encode(self._end(chunk.finish, tokens_in)))
        return b"".join(parts)

    def _end(self, finish: str, tokens_in: int) -> End:
        now = trio.current_time()
        return End(
            tokens_in=tokens_in,
            tokens_out=self._tokens,
            stop_reason=finish,
            ttft_ms=round(1000 * ((self._first or now) - self._began), 3),
            duration_ms=round(1000 * (now - self._began), 3),
        )
