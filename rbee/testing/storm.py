"""``python -m rbee.testing.storm``: break whatever can break, at random, and look what is left.

A round is a random cluster on throw-away hosts (`rbee.testing.hosts`) and on this machine, a random
moment, and a random fault (`rbee.testing.faults`). What lies under the fault has to go in time,
the rest to live, and whatever is there afterwards must belong to somebody; the unhurt part is kept
for the next round. Round n of ``--seed S`` is round 0 of ``--seed S+n``, so a failure is repeated
by its own seed, as far as choice goes: the machine's timing is its own.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import attrs
import trio

from rbee.errors import BadInputError, RbeeError
from rbee.gpus import all_gpus
from rbee.testing.cluster import Workload, hear_interrupts
from rbee.testing.deaths import workload_of
from rbee.testing.faults import FAULTS, NEED_NAMESPACES
from rbee.testing.hosts import Hosts, open_hosts_sync, why_no_hosts
from rbee.testing.network_deaths import client_home
from rbee.testing.rounds import MAX_NODES, MAX_WORKERS, Round, draw_round
from rbee.testing.tally import Tally, product_commit, resumed
from rbee.testing.trial import Outcome, run_round
from rbee.testing.world import World, open_world

NODES = tuple(f"n{number}" for number in range(MAX_NODES))
AT_ONCE = {"echo": 2, "vllm": 1}  # each is a cluster of its own
MOST = {"echo": MAX_WORKERS, "vllm": 2}  # workers of a round


@attrs.frozen
class Storm:
    """What is to be run: some rounds from a tally on, some at a time."""

    tally: Tally
    rounds: int
    faults: tuple[str, ...]
    limit: float = float("inf")
    file: Path | None = None

    def ahead(self) -> Iterator[Round]:
        first = self.tally.seed + self.tally.rounds
        for number in range(self.rounds):
            yield draw_round(first + number, NODES, self.faults, most=MOST[self.tally.engine])

    def note(self, outcome: Outcome) -> None:
        """Count a round, tell about it, and write it down."""
        round = outcome.round
        self.tally.note(round.fault.name, outcome.seconds)
        if outcome.problem:
            self.tally.note_failure(
                outcome.leaked, seed=round.seed, round=str(round), repeat=self.repeat(round),
                what=outcome.problem,
            )  # fmt: skip
        if self.file is not None:
            self.tally.save(self.file)
        _tell(outcome, self.repeat(round))

    def repeat(self, round: Round) -> str:
        """Return the command that makes the same choices."""
        chosen = "" if len(self.faults) == len(FAULTS) else f" --faults '{','.join(self.faults)}'"
        return (
            f"python -m rbee.testing.storm --engine {self.tally.engine} --rounds 1 "
            f"--seed {round.seed}{chosen}"
        )


def _tell(outcome: Outcome, repeat: str) -> None:
    seconds = "" if outcome.seconds is None else f"{outcome.seconds:.2f} s"
    sys.stderr.write(f"{outcome.round}  {seconds}\n")
    if outcome.problem:
        sys.stderr.write(f"FAILED: {outcome.problem}\nto repeat: {repeat}\n")


async def run_storm(storm: Storm, hosts: Hosts, workload: Workload) -> None:
    """Run the rounds, each in the next world that is free; the tally has what came of them."""
    left = iter(hosts.values())
    send, rounds = trio.open_memory_channel[Round](0)
    async with AsyncExitStack() as stack:
        variables = {"HOME": str(client_home(hosts))}
        worlds = [
            await stack.enter_async_context(
                open_world(dict(zip(NODES, some, strict=True)), workload, variables)
            )
            for some in zip(*[left] * len(NODES), strict=True)
        ]
        async with trio.open_nursery() as nursery:
            for world in worlds:
                nursery.start_soon(_keep_running, world, storm, rounds.clone())
            rounds.close()
            with trio.move_on_after(storm.limit):
                async with send:
                    for round in storm.ahead():
                        await send.send(round)


async def _keep_running(
    world: World, storm: Storm, rounds: trio.MemoryReceiveChannel[Round]
) -> None:
    async with rounds:
        async for round in rounds:
            storm.note(await run_round(world, round))


def chosen(patterns: str, can_cut: bool) -> tuple[str, ...]:
    """Return the names of the faults that are asked for and possible here.

    Raises:
        BadInputError: none is, or a pattern names none.
    """
    found: list[str] = []
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        named = [name for name in FAULTS if fnmatch(name, pattern)]
        if not named:
            raise BadInputError(
                f"no fault is called {pattern!r}; there are: {', '.join(FAULTS)}",
                hint="python -m rbee.testing.storm --faults 'KILL,*partition'",
            )
        found += [name for name in named if name not in found]
    possible = tuple(name for name in found if can_cut or name not in NEED_NAMESPACES)
    if not possible:
        raise BadInputError(f"{patterns} need network namespaces", hint="run the storm as root")
    return possible


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rbee.testing.storm", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"faults: {', '.join(FAULTS)}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, help="of the first round; random if not given")
    parser.add_argument("--engine", choices=["echo", "vllm"], default="echo")
    parser.add_argument("--faults", default="*", help="names or patterns, divided by commas")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of it")
    parser.add_argument("--resume", action="store_true", help="go on where FILE ends")
    parser.add_argument("--at-once", type=int, help="rounds at the same time")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS",
                        help="begin no round after that")  # fmt: skip
    hear_interrupts()
    # What is frozen is ours to end; trio knows when it can be interrupted, by SIGINT alone.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return _run(parser.parse_args(argv))
    except RbeeError as exc:
        sys.stderr.write(f"error: {exc}\n")
        if exc.hint:
            sys.stderr.write(f"try: {exc.hint}\n")
        return exc.exit_code


def _run(options: argparse.Namespace) -> int:
    if why := why_no_hosts():
        raise BadInputError(f"no storm here: {why}")
    tally = _tally(options)
    at_once = options.at_once or AT_ONCE[options.engine]
    names = [f"{node}-{world}" for world in range(at_once) for node in NODES]
    with tempfile.TemporaryDirectory(prefix="rbee-tiny-") as directory:
        workload = workload_of(options.engine, Path(directory))
        for path in (Path(directory), *Path(directory).rglob("*")):
            path.chmod(0o755)  # the hosts' user reads the model
        with open_hosts_sync(*names, readable=[Path(directory)]) as hosts:
            why = hosts[names[0]].why_no_partition
            faults = chosen(options.faults, not why)
            _say_what_is_missing(why)
            storm = Storm(tally, options.rounds, faults, options.limit, options.json)
            interrupted = _run_until_interrupted(partial(run_storm, storm, hosts, workload))
    sys.stdout.write(f"{tally.table()}\n")
    sys.stdout.write(
        f"{tally.rounds} rounds from seed {tally.seed}, commit {tally.commit}: "
        f"{tally.leaks} leaks, {len(tally.failures)} failures\n"
    )
    return 130 if interrupted else int(bool(tally.failures))


def _run_until_interrupted(storm: Callable[[], Awaitable[None]]) -> bool:
    """Run it; tell whether SIGINT or SIGTERM ended it, and everything it had started."""
    interrupted = False
    try:
        trio.run(storm)
    except* KeyboardInterrupt:
        sys.stderr.write("interrupted; --json FILE --resume goes on\n")
        interrupted = True
    return interrupted


def _tally(options: argparse.Namespace) -> Tally:
    commit = product_commit()
    if not options.resume:
        seed = secrets.randbelow(1 << 31) if options.seed is None else options.seed
        return Tally(seed, commit, options.engine)
    if options.json is None:
        raise BadInputError("--resume needs --json FILE, which it goes on with")
    return resumed(options.json, commit, options.engine)


def _say_what_is_missing(why_no_partition: str) -> None:
    if why_no_partition:
        without = ", ".join(sorted(NEED_NAMESPACES))
        sys.stderr.write(f"without {without}: {why_no_partition}\n")
    if not all_gpus():
        sys.stderr.write("no GPU here: its memory is not looked at\n")


if __name__ == "__main__":
    sys.exit(main())
