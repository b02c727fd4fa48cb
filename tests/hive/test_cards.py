"""Whether a card has its memory back after a worker, as NVML tells it to us."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext

import pytest
import trio

from rbee import guard
from rbee.errors import MachineError
from rbee.gpus import Usage
from rbee.hive.cards import Cards, verdict

GIB = 1 << 30
US = {os.getpid(): guard.start_time(os.getpid())}  # plays the worker, or somebody else
GONE = {2**22 + 1: 5}  # above any pid
BEFORE = Usage(0, GIB)


@pytest.mark.parametrize(
    ("after", "processes", "taken", "code"),
    [
        (Usage(0, GIB), US, 0, ""),
        (Usage(0, GIB + (1 << 20)), US, 0, ""),  # a driver's own comes and goes
        (Usage(0, 25 * GIB, dict.fromkeys(US, 24 * GIB)), US, 0, "stuck"),
        (Usage(0, 25 * GIB, dict.fromkeys(GONE, 24 * GIB)), GONE, 0, "stuck"),  # a dead one's
        (Usage(0, 25 * GIB, dict.fromkeys(US, 24 * GIB)), GONE, 0, ""),  # somebody else's
        (Usage(0, 25 * GIB, dict.fromkeys(US, 24 * GIB)), dict.fromkeys(US, 1), 0, ""),  # his pid
        (Usage(0, 25 * GIB), US, 0, "unverified"),  # nobody is shown
        (Usage(0, 25 * GIB, dict.fromkeys(GONE, GIB)), US, 0, "unverified"),  # pids of a host
        (Usage(0, 25 * GIB), US, 24 * GIB, ""),  # another worker has started since
    ],
)
def test_the_memory_is_back_or_it_is_told_who_holds_it(
    after: Usage, processes: dict[int, int], taken: int, code: str
) -> None:
    error = verdict(BEFORE, after, processes, taken)
    assert (error.code if error else "") == code
    if error:
        assert "24.0 GiB" in error.message
        assert error.hint == "nvidia-smi"


async def test_a_driver_that_hangs_is_not_waited_for() -> None:
    naps = [0.0, 0.5]

    def look(device: str) -> list[Usage]:
        time.sleep(naps.pop(0))
        return [BEFORE]

    cards = Cards("0", look)
    await cards.begin()
    start = trio.current_time()
    with pytest.raises(MachineError, match="NVML does not answer") as caught:
        await cards.check_back(lambda: 0, within=0.1)
    assert caught.value.code == "unverified"
    assert trio.current_time() - start < 0.4


@pytest.mark.parametrize(
    ("after", "code"),
    [
        ([], "unverified"),
        ([Usage(0, 0)], ""),
        ([Usage(0, GIB)], "unverified"),
        ([Usage(0, GIB, dict.fromkeys(US, GIB))], "stuck"),
    ],
)
async def test_where_nvml_was_silent_at_the_start_only_an_empty_card_is_back(
    after: list[Usage], code: str
) -> None:
    seen = [[], after]
    cards = Cards("0", lambda device: seen[0] if len(seen) == 1 else seen.pop(0))
    await cards.begin()
    cards.note_tree(os.getppid())  # we are below it
    refused = pytest.raises(MachineError, check=lambda error: error.code == code)
    with refused if code else nullcontext():
        await cards.check_back(lambda: 0, within=0.05)


async def test_the_tree_of_a_worker_is_noted_while_it_lives() -> None:
    cards = Cards("0", lambda device: [BEFORE])
    await cards.begin()
    cards.note_tree(os.getppid())
    assert cards.processes.items() >= US.items()
    cards.note_tree(0)
    assert 0 not in cards.processes
