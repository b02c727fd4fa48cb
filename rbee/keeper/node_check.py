"""``node check``: each step on stdout as it is over, and what became of it in the registry."""

from __future__ import annotations

from typing import Any

import attrs
import trio

from rbee.aio import open_aio
from rbee.errors import RbeeError
from rbee.home import Home, find_home
from rbee.keeper.flags import DataFlags
from rbee.keeper.output import Output, open_output, print_data, print_json
from rbee.model import LOCALHOST
from rbee.nodes import check
from rbee.nodes.check import Checkup, Step
from rbee.nodes.store import NodeStore
from rbee.printable import printable
from rbee.wire import codec

WIDTH = max(map(len, check.STEPS))
SHORT = 0.005  # seconds below which a step's duration is not worth telling


async def check_node(flags: DataFlags, name: str) -> None:
    """``node check``; raises the error of the first step that failed."""
    home = find_home(flags.home)
    async with open_output(quiet_data=flags.json) as output:
        teller = Teller(name, output, flags.json)
        checkup = Checkup(teller.begin, teller.tell)
        if name == LOCALHOST:
            await _check_here(home, checkup)
        else:
            await _check_there(NodeStore.of(home), name, checkup)
    if flags.json:
        print_json(_told(name, checkup))
    if teller.error is not None:
        raise teller.error
    if checkup.error is not None:
        raise checkup.error


async def _check_there(store: NodeStore, name: str, checkup: Checkup) -> None:
    node = await store.get(name)
    async with open_aio(name="ssh", uvloop=False) as aio:
        await check.check_node(node, aio, checkup)
    if checkup.error is None:
        await store.note_ready(name, checkup.found)
    else:
        await store.note_failure(name, str(checkup.error), checkup.status)


async def _check_here(home: Home, checkup: Checkup) -> None:
    """Check this machine, to which no SSH leads."""
    from rbee.hive.detect import detect

    checkup.begin("rbee")
    found = await trio.to_thread.run_sync(detect, home.root)  # a driver may take its time
    checkup.succeed(f"{found['rbee']}, Python {found['python']}")
    await check.check_here(found, checkup)


# what is told -------------------------------------------------------------------------------------
@attrs.define(eq=False)
class Teller:
    """Prints each step as it is over; ``error`` is of a stdout that takes no more."""

    _name: str
    _output: Output
    _quiet: bool
    error: RbeeError | None = None

    def begin(self, step: str) -> None:
        self._output.await_answer("keeper", f"{self._name}: {step}", "check")

    def tell(self, step: Step) -> None:
        self._output.end_step()
        if self._quiet:
            return
        try:
            print_data(printable(_line(step)))
        except RbeeError as exc:  # the check goes on: its result is noted
            self.error = self.error or exc


def _line(step: Step) -> str:
    seconds = f"{step.seconds:.2f} s" if step.seconds and step.seconds >= SHORT else ""
    return f"{step.name:{WIDTH}}  {step.outcome.value:7}  {seconds:>7}  {step.text}".rstrip()


def _told(name: str, checkup: Checkup) -> dict[str, Any]:
    error = checkup.error
    return {
        "node": name,
        "status": checkup.status.value,
        "error": error.message if error else "",
        "hint": error.hint if error else "",
        "steps": codec.to_dict(checkup.steps),
        "capabilities": checkup.found or {},
    }
