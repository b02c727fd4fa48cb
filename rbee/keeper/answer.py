"""One answer: a job's events on their way to the two output streams."""

from __future__ import annotations

from typing import Any

import attrs

from rbee.client import AsyncClient
from rbee.keeper.output import Output
from rbee.wire.messages import End, Narration, Queued, Started, TaskRequest, Token


@attrs.define(eq=False)
class Answer:
    """What a job has brought so far."""

    job_id: str = ""
    started: Started | None = None
    end: End | None = None
    parts: list[str] = attrs.field(factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def facts(self) -> dict[str, Any]:
        """Return the answer as ``--json`` prints it."""
        facts: dict[str, Any] = {"text": self.text, "job_id": self.job_id}
        if self.end is not None:
            facts |= {field.name: getattr(self.end, field.name) for field in attrs.fields(End)}
        if self.started is not None:
            names = ("model", "node", "worker_id")
            facts |= {name: getattr(self.started, name) for name in names}
        return facts


async def stream_answer(
    client: AsyncClient, task: TaskRequest, output: Output, answer: Answer
) -> None:
    """Have ``task`` answered: text to stdout as it comes, the rest to stderr, all into ``answer``.

    Raises the job's error. Cancelling cancels the job; ``answer`` then holds what has come.
    """
    try:
        async with client.stream(task) as events:
            async for event in events:
                answer.job_id = events.job_id
                await _take(event, output, answer)
    finally:
        output.settle()


async def _take(event: object, output: Output, answer: Answer) -> None:
    match event:
        case Token():
            answer.parts.append(event.t)
            await output.data(event.t)
        case Narration():
            await output.narrate(event.actor, event.action, event.text, event.share)
        case Queued() if event.position > 0:
            await output.narrate("queen", "queue", f"{event.position} before this one")
        case Started():
            answer.started = event
            output.await_answer("worker", event.model)
        case End():
            answer.end = event
