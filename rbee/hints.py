"""Commands for errors to suggest: each one runs as it stands."""

from __future__ import annotations

import shlex

MODEL = "smollm2-135m"  # of the built-in aliases; where an error knows no other


def infer(*flags: object, model: str = MODEL, prompt: str = "Hello") -> str:
    """Write an `infer` with ``flags`` beside the two that it needs."""
    words = ["rbee-keeper", "infer", "--model", model, "--prompt", prompt, *map(str, flags)]
    return shlex.join(words)


def logs_of(worker_id: str, node: str) -> str:
    """Write the `logs` of a worker, which lie on its node."""
    from rbee.model import LOCALHOST  # which imports us

    where = "" if node == LOCALHOST else f" --node {node}"
    return f"rbee-keeper logs --worker {worker_id}{where}"
