"""rbee on a real GPU: the memory back after every kill, starts and throughput.

    benchmarks/gpu.sh [--model DIR] [--json FILE] [PART …]

On a machine with an NVIDIA GPU where rbee[cuda] is installed. Each part runs alone and takes at
most --limit seconds: what it had no time for is skipped, and comes with the same command and
--missing. FILE takes every figure at once; a later run adds to what is in it. The table goes to
stderr, the JSON to stdout as well.

check       the engine can be imported, `rbee-hive detect`, `rbee-keeper infer`, the process tree
memory      kill -9 of each process of a cluster and of pairs of them, while it loads and while it
            streams: seconds until the card is empty again, and what is left; the same for the API
            server of vLLM's own server
start       first and second worker from the zygote, with and without CUDA graphs; vLLM's sleep
stock       vLLM's own server, order to first token, with and without CUDA graphs
throughput  1, 64 and 256 streams through the queen, and straight to the same worker
share       two workers on one card, 507 for what cannot fit, --device 0,1 where there are two
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
import trio
from gpu_card import Card, open_card
from gpu_check import check
from gpu_memory import memory
from gpu_record import Bench, Record, facts
from gpu_share import share
from gpu_start import start, stock
from gpu_subject import Subject
from gpu_throughput import throughput
from startup import show

from rbee.home import find_home
from rbee.models.catalog import GGUF, list_models
from rbee.units import size

Part = Callable[[Bench, Subject, Card], Awaitable[None]]
PARTS: dict[str, Part] = {
    "check": check, "memory": memory, "start": start, "stock": stock, "throughput": throughput,
    "share": share,
}  # fmt: skip


@attrs.frozen
class Options:
    parts: tuple[str, ...]
    subject: Subject
    file: Path | None
    commit: str
    limit: float
    only: str
    missing: bool


def parse() -> Options:
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--model", help="directory of a model (default: the catalog's SmolLM2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are kept")
    parser.add_argument("--limit", type=float, default=450, help="seconds of a part (450)")
    parser.add_argument("--only", default="", metavar="TEXT", help="figures with this in the name")
    parser.add_argument("--missing", action="store_true", help="only what FILE has no figure of")
    parser.add_argument("--kv-cache", default="20G", help="of each worker and server (20G)")
    parser.add_argument("--device", default="0", help="index of the card (0)")
    parser.add_argument("--engine", default="vllm", help="echo: a rehearsal")
    parser.add_argument("--backend", default="cuda", help="cpu: a rehearsal without a GPU")
    parser.add_argument("--commit", default="", help="of this tree, where git cannot tell")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    model = given.model or cached_model()
    if model is None:
        parser.error("no --model, and the catalog has none: rbee-keeper model pull smollm2-135m")
    kv = size(given.kv_cache, hint="benchmarks/gpu.sh --kv-cache 20G")
    return Options(
        parts=tuple(given.parts or PARTS),
        subject=Subject(model, given.engine, given.backend, given.device, kv),
        file=given.json,
        commit=given.commit,
        limit=given.limit,
        only=given.only,
        missing=given.missing,
    )


def cached_model() -> str | None:
    """Return SmolLM2-135M as this user's home has it for vLLM."""
    for item in list_models(find_home()):
        entry = item.entry
        if entry and not item.damage and entry.dtype != GGUF and "smollm2" in entry.reference:
            return str(item.directory)
    return None


async def measure(options: Options) -> Record:
    with open_card(options.subject.backend, int(options.subject.device)) as card:
        record = Record(options.file, {**facts(options.commit), **card.facts()})
        record.load()
        for name in options.parts:
            show(f"--- {name}")
            until = trio.current_time() + options.limit
            bench = Bench(record, until, options.only, options.missing)
            await PARTS[name](bench, options.subject, card)
        return record


def main() -> None:
    record = trio.run(measure, parse())
    show("\n" + record.table())
    print(record.as_json())


if __name__ == "__main__":
    main()
