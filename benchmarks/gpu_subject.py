"""What the workers and vLLM's own server run, so that both get the same."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import attrs
import httpx
from startup import GaveUpError

from rbee.testing.cluster import Workload

PROMPT = "Write a long story about a sailor who crosses every ocean of the world."
SEQUENCES = 256
PATIENCE = 300.0


@attrs.frozen
class Subject:
    """A model on a device. ``kv`` bytes of KV cache make it clear whether memory is back."""

    model: str
    engine: str
    backend: str
    device: str
    kv: int

    @property
    def is_real(self) -> bool:
        return self.engine == "vllm"

    def workload(self) -> Workload:
        return Workload(self.engine, self.model, PATIENCE)

    def flags(self) -> list[str]:
        """Return those of a keeper's command for a quick start, without CUDA graphs."""
        if not self.is_real:
            return []
        flags = ["--backend", self.backend, "--device", self.device, "--kv-cache", str(self.kv)]
        return [*flags, "--engine-arg", "enforce-eager=true"]

    def task(self, graphs: bool = False, **engine_args: str) -> dict[str, Any]:
        """Return the body of a task that gets one short answer."""
        body: dict[str, Any] = {
            "model": self.model, "engine": self.engine, "prompt": PROMPT, "max_tokens": 4,
            "temperature": 0, "keep_alive": 600,
        }  # fmt: skip
        if not self.is_real:
            return body
        wanted = {} if graphs else {"enforce-eager": "true"}
        wanted |= {name.replace("_", "-"): value for name, value in engine_args.items()}
        body |= {"backend": self.backend, "device": self.device, "engine_args": wanted}
        if "gpu-memory-utilization" not in wanted:
            body["kv_cache_bytes"] = self.kv
        return body

    def stock_options(self, graphs: bool) -> list[str]:
        options = [f"--kv-cache-memory-bytes={self.kv}", f"--max-num-seqs={SEQUENCES}"]
        return options if graphs else [*options, "--enforce-eager"]


async def first_token(client: httpx.AsyncClient, body: Mapping[str, Any]) -> float:
    """Run one task to its end; return the seconds from the order to its first token."""
    began, seconds, text = time.monotonic(), 0.0, b""
    headers = {"accept": "text/event-stream"}
    async with client.stream("POST", "/v2/tasks", json=dict(body), headers=headers) as response:
        async for chunk in response.aiter_raw():
            text += chunk
            if not seconds and b"event: token" in text:
                seconds = time.monotonic() - began
    if response.status_code != 200 or b"event: end" not in text:
        raise GaveUpError(f"no answer ({response.status_code}): {text[-1500:].decode()}")
    return seconds


def error_of(text: str) -> dict[str, Any]:
    """Return the error that a refused task tells, as its event or as its body."""
    for line in text.splitlines():
        if line.startswith("data:") and '"code"' in line:
            found = json.loads(line.removeprefix("data:"))
            return dict(found)
    body = json.loads(text)
    return dict(body["error"])
