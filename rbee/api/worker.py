"""What a worker's own routes are; all others are its engine's."""

from __future__ import annotations

import attrs

from rbee.api.operation import Operation
from rbee.api.queen import HEALTH, METRICS, SHUTDOWN
from rbee.wire import messages as m

MEANT_FOR = {"X-Rbee-Worker-Id": "whom it is meant for: a port may be another worker's by now"}

OPERATIONS = [
    Operation(
        "POST", m.EXECUTE, "Run one prompt.\nClosing the connection cancels it.",
        takes=m.ExecuteRequest, gives={200: m.Token}, only_events=True,
        events=(m.Started, m.Token, m.End, m.Error), refuses=(409, 499, 502, 503),
        headers=MEANT_FOR,
    ),
    Operation(
        "DELETE", m.EXECUTE + "/{job_id}", "Cancel a job; one that has ended is fine.",
        gives={204: None},
    ),
    Operation(
        "GET", m.READY, "Tell how it stands; 503 until it is ready.",
        gives={200: m.ReadyState, 503: m.ReadyState}, refuses=(409,), headers=MEANT_FOR,
    ),
    attrs.evolve(SHUTDOWN, takes=m.StopWorker, needs_body=False, refuses=(409,)),
    HEALTH, METRICS,
]  # fmt: skip
ABOUT = (
    "One model, loaded. What is not listed here is answered by its engine: vLLM tells its own "
    "routes at `/openapi.json`."
)
