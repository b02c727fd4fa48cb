"""``run``: a conversation in the terminal."""

from __future__ import annotations

import os
import select
import signal
import sys
from functools import partial

import trio

from rbee.errors import OwnerGoneError, RbeeError, leaves
from rbee.home import open_home
from rbee.keeper.answer import Answer, stream_answer
from rbee.keeper.flags import AnswerFlags
from rbee.keeper.output import (
    Output,
    StdoutClosedError,
    ToldError,
    is_terminal,
    note,
    open_output,
    print_error,
    print_json,
    write,
)
from rbee.keeper.queen import QueenAccess, open_queen
from rbee.keeper.sources import load_settings
from rbee.keeper.task import chat_task, check_known
from rbee.wire.messages import Message

NO_QUEEN = ("unreachable", "queen_stopping", "stream_broken")
EXITS = ("/exit", "/quit", "/bye")


async def chat(flags: AnswerFlags, model: str) -> None:
    """Talk until ``/exit`` or the end of stdin; Ctrl+C ends the current answer first."""
    home = open_home(flags.home)
    config = load_settings(home)
    async with (
        open_output(quiet_data=flags.json) as output,
        open_queen(
            home,
            config,
            url=flags.queen_url or "",
            token_file=flags.token_file or "",
            check=partial(check_known, flags, model, config),
        ) as queen,
    ):
        await Conversation(queen, flags, model, output).keep_talking()


class Conversation:
    """What has been said, and the loop that goes on with it."""

    def __init__(self, queen: QueenAccess, flags: AnswerFlags, model: str, output: Output) -> None:
        self._queen = queen
        self._flags = flags
        self._model = model
        self._said: list[Message] = []
        self._output = output
        self._failed = False
        self._lines = Lines(0)
        self._prompt = ">>> " if is_terminal(sys.stdin) else ""

    async def keep_talking(self) -> None:
        if self._prompt:
            note(f"{self._model}: /exit or Ctrl+D ends, Ctrl+C ends an answer")
        while True:
            await write(2, self._prompt.encode())
            line = await self._lines.next()
            if line is None or line.strip() in EXITS:
                break
            if line.strip():
                await self._survive(line.strip())
        if self._failed and not self._prompt:  # a script goes by the exit code
            raise ToldError("an answer failed")

    async def _survive(self, text: str) -> None:
        """Reply, and go on talking when only this answer failed."""
        try:
            await self._reply(text)
        except* RbeeError as group:
            error = next(leaf for leaf in leaves(group) if isinstance(leaf, RbeeError))
            if isinstance(error, StdoutClosedError | OwnerGoneError) or error.code in NO_QUEEN:
                raise
            self._said.pop()
            print_error(error)
            self._failed = True

    async def _reply(self, text: str) -> None:
        self._said.append(Message("user", text))
        answer = Answer()
        task = chat_task(self._flags, self._model, self._said)
        with trio.open_signal_receiver(signal.SIGINT) as interrupts:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_at_first, interrupts, nursery.cancel_scope)
                await stream_answer(self._queen.client, task, self._output, answer)
                nursery.cancel_scope.cancel(reason="answered")
        if answer.parts:  # a cancelled one counts as far as it came
            self._said.append(Message("assistant", answer.text))
        if self._flags.json:
            print_json(answer.facts())


async def _cancel_at_first(interrupts: object, scope: trio.CancelScope) -> None:
    async for _ in interrupts:  # type: ignore[attr-defined]
        scope.cancel(reason="Ctrl+C")


class Lines:
    """Read lines from a file descriptor; cancellable, unlike ``input()`` in a thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    async def next(self) -> str | None:
        """Return the next line without its end; None when there is no more."""
        while b"\n" not in self._rest:
            if not self._poll.poll(0):  # a file is always ready, and epoll would refuse it
                await trio.lowlevel.wait_readable(self._fd)
            chunk = self._read()
            if not chunk:
                rest, self._rest = self._rest, b""
                return rest.decode("utf-8", "replace") if rest else None
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace")

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, 65536)
        except OSError:  # the terminal went away
            return b""
