"""The results of a storm, added up over its runs: one JSON file."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import attrs

import rbee
from rbee.errors import BadInputError, ConflictError
from rbee.home import write_atomic

PRODUCT = ("rbee", ":!rbee/testing")


@attrs.define
class Tally:
    """What came of all rounds so far.

    Attributes:
        rounds: how many there were; the next one's seed is ``seed + rounds``.
        leaks: in how many of them something was left.
        commit: of the product's code, see `product_commit`.
        seconds: to clean, by fault; a round that ends nothing adds none.
        failures: what did not hold, leaks among it.
    """

    seed: int
    commit: str
    engine: str
    rounds: int = 0
    leaks: int = 0
    seconds: dict[str, list[float]] = attrs.field(factory=dict)
    failures: list[dict[str, Any]] = attrs.field(factory=list)

    def note(self, fault: str, seconds: float | None) -> None:
        """Count a round."""
        self.rounds += 1
        times = self.seconds.setdefault(fault, [])
        if seconds is not None:
            times.append(round(seconds, 3))

    def note_failure(self, leaked: bool, **facts: Any) -> None:
        self.leaks += leaked
        self.failures.append({"leak": leaked, **facts})

    def as_json(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds, "leaks": self.leaks, "seed": self.seed, "commit": self.commit,
            "engine": self.engine,
            "faults": {name: summary(times) for name, times in sorted(self.seconds.items())},
            "failures": self.failures,
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Write it so that a storm that is cut off has lost no round.

        Raises:
            MachineError: it cannot be written.
        """
        write_atomic(path, json.dumps(self.as_json(), indent=1) + "\n")

    def table(self) -> str:
        """Lay the times out as Markdown, in seconds."""
        lines = ["| fault | rounds that end something | p50 | p99 | max |", "|---|---|---|---|---|"]
        for name, one in self.as_json()["faults"].items():
            times = (f"{one[key]:.2f}" if one["n"] else "" for key in ("p50", "p99", "max"))
            lines.append(f"| {name} | {one['n']} | {' | '.join(times)} |")
        return "\n".join(lines)


def summary(times: list[float]) -> dict[str, Any]:
    """Return ``n``, ``p50``, ``p99``, ``max`` and, to add to, the times themselves."""
    ordered = sorted(times)
    return {
        "n": len(ordered), "p50": percentile(ordered, 0.5), "p99": percentile(ordered, 0.99),
        "max": percentile(ordered, 1.0), "seconds": times,
    }  # fmt: skip


def percentile(ordered: list[float], share: float) -> float | None:
    """Return the smallest value that ``share`` of all do not exceed; None of none."""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def resumed(path: Path, commit: str, engine: str) -> Tally:
    """Read the tally to go on with.

    Raises:
        BadInputError: there is none in the file.
        ConflictError: it is of another commit's code, or of another engine.
    """
    again = f"python -m rbee.testing.storm --json {path}   # without --resume: from the beginning"
    try:
        told = json.loads(path.read_text())
        tally = Tally(
            int(told["seed"]), str(told["commit"]), str(told["engine"]), int(told["rounds"]),
            int(told["leaks"]),
            {name: list(one["seconds"]) for name, one in told["faults"].items()},
            list(told["failures"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadInputError(f"{path} holds no storm to go on with: {exc!r}", hint=again) from exc
    if (tally.commit, tally.engine) != (commit, engine):
        raise ConflictError(
            f"the storm in {path} is of commit {tally.commit} with {tally.engine}, this one is of "
            f"{commit} with {engine}: rounds add up only over one commit's code and one engine",
            code="other_storm",
            hint=again,
        )
    return tally


def product_commit() -> str:
    """Return the last commit that changed the product's code, ``+changes`` if there are any.

    Without a repository, as from a wheel, it is the version. What is only for tests does not count.
    """
    tree = Path(rbee.__file__).parents[1]
    commit = _git(tree, "log", "-1", "--format=%H", "--", *PRODUCT)
    if not commit:
        return f"version {rbee.__version__}"
    changes = _git(tree, "status", "--porcelain", "--", *PRODUCT)
    return f"{commit}+changes" if changes else commit


def _git(tree: Path, *argv: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(tree), *argv], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
