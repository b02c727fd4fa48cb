"""The worker's own figures, as Prometheus text."""

from __future__ import annotations

from collections import Counter

import attrs

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("done", "cancelled", "failed", "refused")


@attrs.define(eq=False)
class Figures:
    """Counters since the worker's start."""

    jobs: Counter[str] = attrs.field(factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0

    def text(self, *, ready: bool, jobs_running: int, engine_running: int) -> str:
        jobs = {f'{{outcome="{name}"}}': self.jobs[name] for name in OUTCOMES}
        return "".join(
            (
                _family("rbee_worker_ready", "gauge", "Whether it takes work.", {"": int(ready)}),
                _family("rbee_jobs_running", "gauge", "Jobs in progress.", {"": jobs_running}),
                _family("rbee_engine_requests", "gauge", "In the engine.", {"": engine_running}),
                _family("rbee_jobs_total", "counter", "Jobs by their end.", jobs),
                _family("rbee_tokens_in_total", "counter", "Of prompts.", {"": self.tokens_in}),
                _family("rbee_tokens_out_total", "counter", "Generated.", {"": self.tokens_out}),
            )
        )


def _family(name: str, kind: str, text: str, values: dict[str, int]) -> str:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    lines += [f"{name}{labels} {value}" for labels, value in values.items()]
    return "\n".join(lines) + "\n"
