"""How far a download is: lines that a child writes to its log, words that its parent tells.

The child writes one JSON object a line, ``{"done": 5, "total": 9}`` or ``{"told": "retry", …}``,
among whatever else is in its log; the guard may cut that log short at any time.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import trio

from rbee.errors import RbeeError
from rbee.models.child import Narrate, Runner
from rbee.units import human

EVERY = 0.5
WINDOW = 10.0  # seconds over which the rate is taken


@attrs.define(eq=False)
class Meter:
    """Tells amount, rate and time left; the rate is that of the last seconds."""

    clock: Any = time.monotonic
    _seen: deque[tuple[float, int]] = attrs.field(factory=deque)

    def tell(self, done: int, total: int) -> str:
        """Return such as ``1.2 of 3.4 GiB, 24.0 MiB/s, 1:31 left``."""
        text = amount(done, total)
        rate = self._rate(done)
        if rate > 0:
            text += f", {human(rate)}/s"
            if total > done:
                text += f", {minutes((total - done) / rate)} left"
        return text

    def _rate(self, done: int) -> float:
        now = self.clock()
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()  # a file was begun anew
        self._seen.append((now, done))
        while now - self._seen[0][0] > WINDOW and len(self._seen) > 2:
            self._seen.popleft()
        began, before = self._seen[0]
        return (done - before) / (now - began) if now > began else 0.0


def amount(done: int, total: int) -> str:
    """Write two sizes, the unit once where it is the same."""
    first, second = human(done), human(total)
    number, _, unit = first.partition(" ")
    return f"{number if second.endswith(f' {unit}') else first} of {second}"


def minutes(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    left = f"{rest // 60}:{rest % 60:02}"
    return f"{hours}:{left:0>5}" if hours else left


# in the child -------------------------------------------------------------------------------------
@attrs.define(eq=False)
class Printer:
    """Writes progress to stdout, at most every ``EVERY`` seconds."""

    total: int = 0
    _next: float = 0.0

    def update(self, done: int, *, now: bool = False) -> None:
        if now or time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY
            self._write({"done": done, "total": self.total})

    def tell(self, action: str, text: str) -> None:
        self._write({"told": action, "text": text})

    def _write(self, line: dict[str, object]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


# in its parent ------------------------------------------------------------------------------------
async def run_followed(
    run: Runner,
    argv: Sequence[str],
    log: Path,
    narrate: Narrate,
    env: Mapping[str, str] | None = None,
) -> int:
    """Run a child to its end and narrate meanwhile what its log tells; return its exit code."""
    follower = Follower(log, narrate)
    failure: RbeeError | None = None
    code = -1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.keep_reading)
        try:
            code = await run(argv, log=log, env=env)
        except RbeeError as exc:  # the caller is not to see the nursery around it
            failure = exc
        nursery.cancel_scope.cancel(reason="the child has ended")
    if failure:
        raise failure
    follower.read()
    return code


@attrs.define(eq=False)
class Follower:
    """Reads the new lines of a log; of several on one thing the last one counts."""

    log: Path
    narrate: Narrate
    _meter: Meter = attrs.field(factory=Meter)
    _offset: int = 0
    _told: int = -1

    async def keep_reading(self) -> None:
        while True:
            self.read()
            await trio.sleep(EVERY)

    def read(self) -> None:
        told: dict[str, str] = {}
        last: dict[str, Any] = {}
        for line in self._lines():
            if "told" in line:
                told[str(line["told"])] = str(line.get("text", ""))
            elif type(line.get("done")) is type(line.get("total")) is int:
                last = line
        for action, text in told.items():
            self.narrate(action, text)
        if last and last["done"] != self._told:
            self._told = last["done"]
            text = self._meter.tell(last["done"], last["total"])
            self.narrate("download", text, share=min(last["done"] / (last["total"] or 1), 1.0))

    def _lines(self) -> list[dict[str, Any]]:
        try:
            with self.log.open("rb") as file:
                if self._offset > file.seek(0, 2):
                    self._offset = 0  # the guard has moved the older lines away
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._offset += len(whole) + len(newline)
        return [told for line in whole.splitlines() if (told := _object(line))]


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line) if line.startswith(b"{") else None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
