"""Whether a worker's GPU memory is back: its cards before it, and after it.

NVML tells which process holds how much. Where it does not, in a container say, a card's memory in
use is compared with what it was before the worker started, plus what others have taken since. Then
nobody knows whose the rest is, and it is not claimed that it is back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import attrs
import trio

from rbee import guard
from rbee.errors import MachineError
from rbee.gpus import Usage, usage
from rbee.remains import PROCESSES, STUCK, UNVERIFIED
from rbee.units import human

log = logging.getLogger(__name__)

BACK = 1.0  # seconds for a driver to take the memory back
POLL = 0.1
SLACK = 64 << 20  # bytes that come and go on a card by themselves
SEE = "nvidia-smi"

Look = Callable[[str], Sequence[Usage]]


@attrs.define(eq=False)
class Cards:
    """The cards of one worker that has some.

    Attributes:
        before: what was in use before it started, empty if NVML did not tell; ``began``: when
            that was.
        processes: those it had, {pid: start time}.
    """

    device: str
    look: Look = usage
    before: tuple[Usage, ...] = ()
    began: float = 0.0
    processes: dict[int, int] = attrs.field(factory=dict)
    _looking: trio.CapacityLimiter = attrs.field(factory=partial(trio.CapacityLimiter, 1))

    async def begin(self) -> None:
        """Note what is in use before the worker starts."""
        self.began = trio.current_time()
        self.before = tuple(await self._seen())

    def note_tree(self, pid: int) -> None:
        """Note a process of the worker's and all below it, while they live."""
        if pid:
            root = {pid: guard.start_time(pid)}
            with suppress(OSError):  # no descriptors: those noted so far have to do
                self.processes |= root | guard.descendants(root)

    async def check_back(self, taken_since: Callable[[], int], within: float = BACK) -> None:
        """Return once the memory is back.

        Args:
            taken_since: tells how many bytes others may have taken on a card since `begin`.

        Raises:
            MachineError: it is not after ``within`` seconds (``stuck``), or nobody can say
                (``unverified``).
        """
        error = _unseen(f"NVML does not answer about device {self.device}")
        with trio.move_on_after(within):
            while (found := await self._missing(taken_since)) is not None:
                error = found
                await trio.sleep(POLL)
            return
        raise error

    async def _seen(self) -> Sequence[Usage]:
        """Look at the cards; a driver that hangs holds one thread, and not the end."""
        return await trio.to_thread.run_sync(
            self.look, self.device, abandon_on_cancel=True, limiter=self._looking
        )

    async def _missing(self, taken_since: Callable[[], int]) -> MachineError | None:
        now = await self._seen()
        # Where NVML was silent at its start, nothing but what others have taken is to be there.
        was = self.before or tuple(Usage(one.index, 0) for one in now)
        if not now or len(now) != len(was):
            return _unseen(f"NVML does not tell about device {self.device}")
        for before, after in zip(was, now, strict=True):
            if (error := verdict(before, after, self.processes, taken_since())) is not None:
                return error
        return None


def verdict(
    before: Usage, after: Usage, processes: Mapping[int, int], taken_since: int
) -> MachineError | None:
    """Say what is wrong with a card after a worker's end; None if its memory is back."""
    if held := {pid: n for pid, n in after.by_pid.items() if _is_ours(pid, processes)}:
        told = ", ".join(f"process {pid} holds {human(size)}" for pid, size in held.items())
        return MachineError(
            f"GPU {after.index} has not got its memory back: {told}, although it was ended",
            code=STUCK,
            hint=SEE,
            **{PROCESSES: [{"pid": pid, "gpu_memory": size} for pid, size in held.items()]},
        )
    shows_processes = after.by_pid and all(map(guard.start_time, after.by_pid))
    more = after.used - before.used - taken_since
    if shows_processes or more <= SLACK:
        return None
    return _unseen(
        f"GPU {after.index} has {human(more)} more in use than before the worker was started, and "
        "whose that is cannot be seen from here"
    )


def _is_ours(pid: int, processes: Mapping[int, int]) -> bool:
    """Tell whether NVML means a process that was noted, not one that has got its pid since."""
    return pid in processes and guard.start_time(pid) in (0, processes[pid])


def _unseen(why: str) -> MachineError:
    return MachineError(why, code=UNVERIFIED, hint=SEE)
