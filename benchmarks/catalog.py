"""What the catalog costs: how often a warm `infer` looks at it, and the CPU of one look.

    python benchmarks/catalog.py [--entries 50] [--engine echo] [--rounds 5] >figures.json

A home with that many models is made, an operator's queen started, and one `infer` warms a worker.
Then everything that any process opens below the models directory is counted (inotify) while warm
`infer`s run; the counter is proved by a `model list`, which opens all. The figure is opens per warm
`infer` × CPU of a lookup. `--engine vllm` does the same with a model that is really loaded.

JSON goes to stdout, a line for people to stderr. Everything lies in a directory of its own below
/tmp and is removed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rbee.home import Home, open_home
from rbee.models.catalog import Catalog, Entry, File
from rbee.models.info import model_infos
from rbee.models.inspect import inspect_model
from rbee.testing.tiny_model import write_tiny_model

BUDGET_MS = 2.0
IN_OPEN, IN_NONBLOCK, EVENT = 0x20, 0x800, 1 << 16
KEEPER = (sys.executable, "-m", "rbee")


class Opens:
    """Count what is opened below a directory, by whatever process."""

    def __init__(self, root: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(IN_NONBLOCK)
        for path in (root, *(path for path in root.rglob("*") if path.is_dir())):
            if libc.inotify_add_watch(self._fd, os.fsencode(path), IN_OPEN) < 0:
                raise OSError(ctypes.get_errno(), f"cannot watch {path}")

    def count(self) -> int:
        """Return how many there were since the last call."""
        found = 0
        while data := self._read():
            offset = 0
            while offset < len(data):
                found += 1
                offset += 16 + int.from_bytes(data[offset + 12 : offset + 16], sys.byteorder)
        return found

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, EVENT)
        except BlockingIOError:
            return b""


def fill(home: Home, entries: int) -> None:
    """Put models into the catalog; they share their bytes on the disk."""
    first = write_tiny_model(home.models / "pypi--tiny-0")
    found = inspect_model(first)
    files = tuple(File(name, size) for name, size in found.files)
    for number in range(entries):
        name = f"pypi--tiny-{number}"
        if number:
            shutil.copytree(first, home.models / name, copy_function=os.link)
        entry = Entry(
            f"pypi:tiny-{number}", "pypi", "1.0", files, found.dtype, found.architecture,
            found.parameters, found.context, found.has_chat_template,
        )  # fmt: skip
        Catalog(home.models).save(name, entry)


def cpu_ms(work: Callable[[], object], rounds: int = 20) -> float:
    """Return the median CPU milliseconds of one call."""
    work()
    samples = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        samples.append(1000 * (time.process_time() - begin))
    return statistics.median(samples)


@contextmanager
def own_home() -> Iterator[Home]:
    """Make a home of our own; an operator's queen in it is stopped at the end."""
    place = Path(tempfile.mkdtemp(prefix="rbee-b-", dir="/tmp"))
    os.environ |= {"RBEE_HOME": str(place / "home"), "XDG_RUNTIME_DIR": str(place)}
    try:
        yield open_home()
    finally:
        keeper("queen", "stop")
        shutil.rmtree(place, ignore_errors=True)


def keeper(*arguments: str) -> None:
    subprocess.run((*KEEPER, *arguments), check=True, capture_output=True, text=True)


def infer(engine: str) -> None:
    keeper(
        "infer", "--model", "pypi:tiny-0", "--prompt", "hello", "--engine", engine,
        "--max-tokens", "4",
    )  # fmt: skip


def measure(entries: int, engine: str, rounds: int) -> dict[str, float]:
    with own_home() as home:
        fill(home, entries)
        catalog = Catalog(home.models)
        figures = {
            "entries": float(entries),
            "find_cpu_ms": cpu_ms(lambda: catalog.find("pypi:tiny-0")),
            "list_cpu_ms": cpu_ms(lambda: model_infos(home)),
        }
        keeper("queen", "start", "--port", "0")
        infer(engine)
        opens = Opens(home.models)
        for _ in range(rounds):
            infer(engine)
        figures["opens_per_warm_infer"] = opens.count() / rounds
        keeper("model", "list")
        figures["opens_per_list"] = float(opens.count())
        if figures["opens_per_list"] < entries:
            raise SystemExit("the counter does not count")
    # the least that a lookup opens is every record
    lookups = figures["opens_per_warm_infer"] / entries
    figures["warm_infer_cpu_ms"] = lookups * figures["find_cpu_ms"]
    figures["at_most_ms"] = BUDGET_MS
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entries", type=int, default=50)
    parser.add_argument("--engine", default="echo")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    figures = measure(given.entries, given.engine, given.rounds)
    print(json.dumps(figures, indent=2))
    good = figures["warm_infer_cpu_ms"] <= BUDGET_MS
    print(
        "catalog: {opens_per_warm_infer:.0f} opens and {warm_infer_cpu_ms:.2f} ms CPU per warm "
        "infer (at most {at_most_ms:g}); one find among {entries:.0f} models {find_cpu_ms:.2f} ms, "
        "one list {list_cpu_ms:.1f} ms".format(**figures)
        + ("" if good else "   MISSED"),
        file=sys.stderr,
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
