"""How many descriptors are had in one turn of trio's loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from rbee.web.poller import IN, MANY, open_poller


class Turns(trio.abc.Instrument):
    """Counts the turns of the loop."""

    count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


@contextmanager
def pipes(count: int) -> Iterator[list[tuple[int, int]]]:
    found = [os.pipe() for _ in range(count)]
    try:
        yield found
    finally:
        for fd in (fd for pair in found for fd in pair):
            os.close(fd)


@pytest.mark.parametrize(("count", "is_same"), [(MANY, True), (MANY - 1, False)])
async def test_what_comes_while_many_are_handled_is_had_in_the_same_turn(
    count: int, is_same: bool
) -> None:
    """Where little comes at once a second look would find nothing, and cost as much as a token."""
    turns, seen, over = Turns(), [], trio.Event()
    with pipes(count) as ready, pipes(1) as [(late, far)]:
        async with open_poller() as poller:

            def take(fd: int) -> None:
                poller.remove(fd)
                if not seen:
                    os.write(far, b"x")  # it comes while the others are handled
                seen.append(turns.count)

            def take_late(events: int) -> None:
                poller.remove(late)
                seen.append(turns.count)
                over.set()

            for fd, end in ready:
                os.write(end, b"x")
                poller.add(fd, IN, lambda events, fd=fd: take(fd))
            poller.add(late, IN, take_late)
            trio.lowlevel.add_instrument(turns)
            with trio.fail_after(5):
                await over.wait()
            trio.lowlevel.remove_instrument(turns)
    assert len(seen) == count + 1
    assert (seen[-1] == seen[0]) is is_same


async def test_a_bug_ends_the_watch_of_its_descriptor_only(
    error_records: list[logging.LogRecord],
) -> None:
    def fail(events: int) -> None:
        raise ValueError("a bug")

    other = trio.Event()
    with pipes(2) as [(one, end), (two, far)]:
        async with open_poller() as poller:
            poller.add(one, IN, fail)
            os.write(end, b"x")
            poller.add(two, IN, lambda events: other.set())
            os.write(far, b"x")
            with trio.fail_after(5):
                await other.wait()
            assert len(poller) == 1
            poller.remove(two)
    assert "could not be handled" in error_records.pop().getMessage()
