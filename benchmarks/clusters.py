"""How long a cluster of the echo engine takes to be ready and to be gone, as a test's fixture.

Beside it the time that Python takes to import trio, hypercorn and httpx, which each of a cluster's
processes has to; that of a new program is compared with the import just before it. Runs on an
otherwise quiet machine; looks for what each cluster has left.
"""

import argparse
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import rbee
from rbee.testing.processes import LeakCheck

IMPORTS = "import trio, hypercorn.trio, httpx"
FIRST = """
import time; began = time.monotonic()
import rbee
rbee.Cluster(models=["echo"], engine="echo").start()
print(time.monotonic() - began)
"""


def seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return done.stdout.decode()


def tell(what: str, times: list[float], unit: float) -> None:
    median = statistics.median(times)
    print(f"{what:<32} {median:6.3f} s  (most {max(times):.3f} s, {median / unit:.2f} imports)")


def tell_ratios(imports: list[float], firsts: list[float]) -> None:
    ratios = sorted(first / unit for unit, first in zip(imports, firsts, strict=True))
    median = statistics.median(ratios)
    print(
        f"a new program to its import      {median:6.2f}    ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def in_turns(rounds: int) -> tuple[list[float], list[float]]:
    imports, firsts = [], []
    for _ in range(rounds):
        imports.append(seconds(lambda: python(IMPORTS)))
        firsts.append(float(python(FIRST)))
    return imports, firsts


def main(rounds: int, programs: int) -> None:
    os.environ["RBEE_NONCE"] = nonce = secrets.token_hex(8)
    check = LeakCheck(nonce=nonce, venv=None)
    imports, firsts = in_turns(programs)
    check.wait_clean_sync(10)  # their programs have just ended without a goodbye
    ready, gone, left, files = [], [], [], 0
    for number in range(rounds):
        cluster = rbee.Cluster(models=["echo"], engine="echo")
        ready.append(seconds(cluster.start))
        cluster.client.infer("echo", "one two", max_tokens=2)
        gone.append(seconds(cluster.close))
        left += check.find()
        now = len(list(Path("/proc/self/fd").iterdir()))
        files = files or now
        if now > files:
            left.append(f"{now - files} more open files after cluster {number}")
    unit = statistics.median(imports)
    tell(IMPORTS, imports, unit)
    tell("ready, in a new program", firsts, unit)
    tell_ratios(imports, firsts)
    tell("ready, in one that has imported", ready, unit)
    tell("gone", gone, unit)
    print(f"left by {rounds} clusters: {len(left)}", *left, sep="\n  ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=50, help="clusters of one program")
    parser.add_argument("--programs", type=int, default=9, help="new programs with a cluster each")
    given = parser.parse_args()
    main(given.rounds, given.programs)
