"""What a download costs: `rbee-keeper model pull` against `hf download`, in CPU seconds.

    python benchmarks/download.py [--size BYTES] [--rounds N] >figures.json

A hub on loopback, a process of its own, serves one model with a large file of random bytes. Both
sides fetch it in turns into an empty home; what counts is user + system time of everything that
the command started. rbee checks the hash of what came, `hf download` does not. The medians go to
stdout as JSON and to stderr as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

from rbee.testing.tiny_model import write_tiny_model

REPO = "org/large"
BUDGET = 1.5
BLOCK = 2**24


@attrs.define
class Figures:
    """Samples by name; medians are what counts."""

    samples: dict[str, list[float]] = attrs.field(factory=dict)

    def add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)
        show(f"{name}: {value:.4g}")

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    @property
    def ratio(self) -> float:
        return self.median("rbee CPU s") / self.median("hf CPU s")


def show(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def table(figures: Figures) -> str:
    lines = [f"{'figure':<24}{'median':>12}{'least':>12}{'most':>12}{'rounds':>8}"]
    for name, values in figures.samples.items():
        cells = (statistics.median(values), min(values), max(values))
        lines.append(f"{name:<24}" + "".join(f"{c:>12.4g}" for c in cells) + f"{len(values):>8}")
    mark = "" if figures.ratio <= BUDGET else "   MISSED"
    lines.append(f"\n{'rbee/hf CPU':<24}{figures.ratio:>12.3g}   at most {BUDGET}{mark}")
    return "\n".join(lines)


def write_model(directory: Path, size: int) -> Path:
    """Write a model whose weights are ``size`` random bytes."""
    write_tiny_model(directory)
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for offset in range(0, size, BLOCK):
            file.write(secrets.token_bytes(min(BLOCK, size - offset)))
    return directory


@contextmanager
def open_hub(model: Path) -> Iterator[str]:
    """Serve the model from another process; yield its address."""
    argv = [sys.executable, "-m", "rbee.testing.hub_server", f"{REPO}={model}"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hub:
        assert hub.stdout is not None
        yield hub.stdout.readline().strip()


def cost(argv: Sequence[str], env: Mapping[str, str]) -> tuple[float, float]:
    """Run a command; return the CPU seconds of it and its descendants, and the wall seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(argv, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def program(name: str) -> str:
    """Return the program of the Python that runs this, whatever PATH says."""
    return str(Path(sys.executable).with_name(name))


def environment(directory: Path, url: str) -> dict[str, str]:
    drop = ("RBEE_", "HF_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    return kept | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(directory / "hf"),
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RBEE_HOME": str(directory / "rbee"),
        "XDG_RUNTIME_DIR": str(directory),
    }


def sides(directory: Path) -> dict[str, list[str]]:
    into = str(directory / "files")
    return {
        "hf": [program("hf"), "download", REPO, "--local-dir", into],
        "rbee": [program("rbee-keeper"), "model", "pull", f"hf:{REPO}"],
    }


def measure(size: int, rounds: int) -> Figures:
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="rbee-b-", dir="/tmp") as place:
        model = write_model(Path(place) / "model", size)
        with open_hub(model) as url:
            # once for the server, which hashes the file when it is asked first, and for bytecode
            for number in range(rounds + 1):
                for side in ("hf", "rbee"):
                    directory = Path(place) / "round"
                    directory.mkdir()
                    cpu, wall = cost(sides(directory)[side], environment(directory, url))
                    shutil.rmtree(directory)
                    if number:
                        figures.add(f"{side} CPU s", cpu)
                        figures.add(f"{side} wall s", wall)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=10**9)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    figures = measure(given.size, given.rounds)
    show("\n" + table(figures))
    medians = {name: figures.median(name) for name in figures.samples}
    ratios = {"rbee/hf CPU": {"ratio": figures.ratio, "at_most": BUDGET}}
    print(json.dumps({"medians": medians, "ratios": ratios}, indent=2))


if __name__ == "__main__":
    main()
