from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from rbee.errors import MachineError
from rbee.models.progress import (
    EVERY,
    WINDOW,
    Follower,
    Meter,
    Printer,
    amount,
    minutes,
    run_followed,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "child.log"


def write(log: Path, *lines: object) -> None:
    with log.open("a") as file:
        file.writelines(f"{line if type(line) is str else json.dumps(line)}\n" for line in lines)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    clock = Clock()
    meter, mib = Meter(clock), 2**20
    assert meter.tell(0, 100 * mib) == "0 B of 100.0 MiB"
    clock.now = 1
    assert meter.tell(10 * mib, 100 * mib) == "10.0 of 100.0 MiB, 10.0 MiB/s, 0:09 left"
    for _ in range(round(WINDOW) + 5):  # nothing comes any more
        clock.now += 1
        text = meter.tell(10 * mib, 100 * mib)
    assert text == "10.0 of 100.0 MiB"


def test_a_file_that_begins_anew_does_not_make_a_negative_rate() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.tell(900, 1000)
    clock.now = 1
    assert meter.tell(100, 1000) == "100 of 1000 B"


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0:00"), (91, "1:31"), (3600, "1:00:00"), (86399, "23:59:59")]
)
def test_time_left_is_told_as_a_clock_does(seconds: float, told: str) -> None:
    assert minutes(seconds) == told


def test_two_amounts_share_their_unit() -> None:
    assert amount(2**30, 3 * 2**30) == "1.0 of 3.0 GiB"
    assert amount(2**20, 3 * 2**30) == "1.0 MiB of 3.0 GiB"


def test_of_several_lines_on_progress_the_last_one_is_told(log: Path, narrate: Any) -> None:
    follower = Follower(log, narrate)
    follower.read()
    write(log, "a warning", {"done": 1, "total": 4}, "{broken", {"done": 2, "total": 4})
    follower.read()
    follower.read()
    assert (narrate.lines, narrate.shares) == ([("download", "2 of 4 B")], [0.5])


def test_what_a_child_tells_is_told_in_order(log: Path, narrate: Any) -> None:
    write(log, {"told": "fetch", "text": "it"}, {"told": "retry", "text": "cut"})
    Follower(log, narrate).read()
    assert narrate.lines == [("fetch", "it"), ("retry", "cut")]


def test_of_many_tries_that_failed_since_the_last_look_one_is_told(log: Path, narrate: Any) -> None:
    write(log, *({"told": "retry", "text": str(n)} for n in range(9)))
    Follower(log, narrate).read()
    assert narrate.lines == [("retry", "8")]


def test_half_a_line_waits_for_its_end(log: Path, narrate: Any) -> None:
    follower = Follower(log, narrate)
    log.write_text('{"done": 1, "to')
    follower.read()
    assert narrate.lines == []
    with log.open("a") as file:
        file.write('tal": 2}\n')
    follower.read()
    assert narrate.shares == [0.5]


def test_a_log_that_was_cut_is_read_from_its_beginning(log: Path, narrate: Any) -> None:
    follower = Follower(log, narrate)
    write(log, "a long line of some other program", {"done": 1, "total": 4})
    follower.read()
    log.write_text("")
    write(log, {"done": 3, "total": 4})
    follower.read()
    assert narrate.shares == [0.25, 0.75]


def test_a_printer_writes_at_most_every_half_second(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer(total=9)
    for done in range(5):
        printer.update(done)
    printer.update(9, now=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"done": 0, "total": 9}, {"done": 9, "total": 9}]


async def test_progress_is_told_twice_a_second_and_once_at_the_end(
    log: Path, narrate: Any, autojump_clock: trio.testing.MockClock
) -> None:
    async def run(argv: Sequence[str], *, log: Path, **_: Any) -> int:
        for done in range(1, 9):
            write(log, {"done": done, "total": 8})
            await trio.sleep(EVERY / 4)
        return 3

    assert await run_followed(run, ["child"], log, narrate) == 3
    assert narrate.shares[-1] == 1.0
    assert len(narrate.shares) <= 4


async def test_a_child_that_cannot_start_is_a_plain_error(log: Path, narrate: Any) -> None:
    async def run(argv: Sequence[str], *, log: Path, **_: Any) -> int:
        raise MachineError("no guard")

    with pytest.raises(MachineError, match="no guard"):
        await run_followed(run, ["child"], log, narrate)
