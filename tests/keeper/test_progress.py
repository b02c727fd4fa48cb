"""Steps, and what a terminal or a file shows of them."""

from __future__ import annotations

import os
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fcntl import ioctl

import pytest
import trio

from rbee.keeper import output as output_module
from rbee.keeper.output import Output, open_output
from rbee.keeper.progress import Step, fit, width
from tests.terminal import screen


def step(action: str = "load", text: str = "m", *, share: float | None = None) -> Step:
    return Step("hive", action, text, 10.0, share)


# steps --------------------------------------------------------------------------------------------
def test_a_worker_tells_more_about_the_loading_that_its_hive_has_begun() -> None:
    loading = step()
    assert loading.take("worker", "load", "weights", 0.2)
    assert loading.told() == "hive: load m · weights 20 %"
    assert loading.take("worker", "load", "KV cache", None)
    assert loading.told() == "hive: load m · KV cache"
    assert loading.over(13.21) == "hive: load m … 3.2 s"
    installing = step("install", "rbee")
    assert installing.take("pip", "install", "Downloading torch", 0.2)
    assert installing.told() == "hive: install rbee · Downloading torch 20 %"


@pytest.mark.parametrize(
    "narration",
    [
        ("hive", "fetch", "m", None),
        ("hive", "load", "other", None),
        ("hive", "load", "other", 0.5),
        ("queen", "load", "m", None),
    ],
)
def test_another_narration_is_another_step(narration: tuple[str, str, str, float | None]) -> None:
    assert not step().take(*narration)


def test_a_share_goes_on_with_its_step_and_never_falls() -> None:
    fetching = step("fetch", "m 1 of 10 MB", share=0.1)
    assert fetching.take("hive", "fetch", "m 5 of 10 MB", 0.5)
    assert fetching.take("hive", "fetch", "m 5 of 10 MB", 0.4)
    assert fetching.told() == "hive: fetch m 5 of 10 MB 50 %"


def test_seconds_too_few_to_matter_are_not_told() -> None:
    assert step().over(10.05) == "hive: load m"


@pytest.mark.parametrize("columns", [1, 2, 5, 10, 20, 33, 40, 59, 60, 80, 200])
@pytest.mark.parametrize("share", [None, 0.0, 0.42, 1.0, 7.0])
def test_the_live_line_is_narrower_than_the_terminal(columns: int, share: float | None) -> None:
    running = step(text="模型/smollm2\n\x1b[2J" * 3, share=share)
    line = running.line(13.21, columns)
    assert width(line) < columns
    assert "\n" not in line
    assert "\x1b" not in line


def test_the_live_line_has_a_bar_where_there_is_a_share_and_room() -> None:
    running = step(share=0.5)
    assert running.line(12, 80) == "hive: load m " + f"{'━' * 12}{'╌' * 12}  50 % 2.0 s"
    assert running.line(12, 40).endswith(f"{'━' * 4}{'╌' * 4}  50 % 2.0 s")
    assert running.line(12, 30) == "hive: load m  50 % 2.0 s"
    assert step().line(12, 80) == "hive: load m 2.0 s"


def test_text_is_cut_by_columns_not_by_characters() -> None:
    assert fit("日本語", 6) == "日本語"
    assert fit("日本語", 5) == "日本…"
    assert fit("日本語", 4) == "日…"
    assert fit("e\u0301" * 3, 3) == "e\u0301" * 3
    assert fit("abc", 0) == ""


# a terminal ---------------------------------------------------------------------------------------
class Terminal:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.shown = b""

    def screen(self) -> list[str]:
        os.set_blocking(self._fd, False)
        try:
            while data := os.read(self._fd, 65536):
                self.shown += data
        except OSError:  # nothing more for now
            pass
        return screen(self.shown.decode())


OpenTerminal = Callable[[], AbstractContextManager[Terminal]]


@pytest.fixture
def open_terminal(monkeypatch: pytest.MonkeyPatch) -> OpenTerminal:
    """Put a terminal where stdout and stderr are, for the length of a block."""

    @contextmanager
    def open_one() -> Iterator[Terminal]:
        saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        ours, theirs = os.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        for fd, _ in saved:
            os.dup2(theirs, fd)
        try:
            with os.fdopen(theirs, "w") as stream, monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", stream)
                patch.setattr(sys, "stderr", stream)
                yield Terminal(ours)
        finally:
            for fd, copy in saved:
                os.dup2(copy, fd)
                os.close(copy)
            os.close(ours)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return open_one


async def test_a_terminal_shows_the_step_live_and_keeps_its_line(
    open_terminal: OpenTerminal,
) -> None:
    with open_terminal() as terminal:
        out = Output()
        await out.narrate("hive", "load", "m")
        await out.narrate("worker", "load", "weights", 0.5)
        (line,) = terminal.screen()
        assert line.startswith("hive: load m · weights ━━━━━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌╌  50 % 0.")
        await out.narrate("queen", "ready", "after 3.2 s")
        await out.data("The answer")
        out.settle()
        assert terminal.screen() == ["hive: load m", "queen: ready after 3.2 s", "The answer", ""]


async def test_seconds_go_by_while_nothing_is_told(
    open_terminal: OpenTerminal, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    monkeypatch.setattr(output_module.time, "monotonic", trio.current_time)
    with open_terminal() as terminal:
        async with open_output() as out:
            await out.narrate("hive", "load", "m")
            await trio.sleep(3.1)
            assert terminal.screen() == ["hive: load m 3.0 s"]
            await out.data("A")
            assert terminal.screen() == ["hive: load m … 3.1 s", "A"]


async def test_waiting_for_an_answer_leaves_no_line(open_terminal: OpenTerminal) -> None:
    with open_terminal() as terminal:
        out = Output()
        out.await_answer("worker", "m")
        out.draw()
        assert terminal.screen() == ["worker: answer m 0.0 s"]
        await out.data("A")
        assert terminal.screen() == ["A"]


async def test_narration_in_the_middle_of_an_answer_has_a_line_of_its_own(
    open_terminal: OpenTerminal,
) -> None:
    with open_terminal() as terminal:
        out = Output()
        await out.data("A")
        await out.narrate("queen", "start", "another")
        await out.data("B")
        assert terminal.screen() == ["A", "queen: start another", "B"]


async def test_a_cancelled_command_leaves_a_clean_terminal(open_terminal: OpenTerminal) -> None:
    with open_terminal() as terminal:
        with trio.CancelScope() as scope:
            async with open_output() as out:
                await out.narrate("hive", "load", "m", 0.5)
                scope.cancel()
                await trio.sleep_forever()
        assert terminal.screen() == ["hive: load m", ""]


async def test_without_colours_a_terminal_still_has_its_live_line(
    open_terminal: OpenTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with open_terminal() as terminal:
        await Output().narrate("hive", "load", "m")
        assert terminal.screen() == ["hive: load m 0.0 s"]
        assert b"\x1b[2m" not in terminal.shown


@pytest.mark.parametrize("name", ["dumb", "", "unknown"])
async def test_a_dumb_terminal_gets_lines(
    open_terminal: OpenTerminal, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TERM", name)
    monkeypatch.setenv("NO_COLOR", "1")
    with open_terminal() as terminal:
        out = Output()
        await out.narrate("hive", "load", "m")
        await out.narrate("worker", "load", "weights", 0.5)
        out.await_answer("worker", "m")
        assert terminal.screen() == ["hive: load m", ""]
        assert b"\x1b" not in terminal.shown


async def test_a_terminal_that_reads_nothing_stops_no_step(open_terminal: OpenTerminal) -> None:
    with open_terminal():
        out = Output()
        for count in range(2000):
            out.step("hive", "load", "x" * 60, count / 2000)
        out.settle()


# a file -------------------------------------------------------------------------------------------
async def test_a_file_gets_a_line_per_step_and_few_of_its_progress(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(output_module.time, "monotonic", lambda: now)
    out = Output()
    await out.narrate("hive", "load", "m")
    for tick in range(1, 29):
        now = 100 + tick / 4
        await out.narrate("worker", "load", "weights", tick / 28)
    await out.narrate("queen", "ready", "after 7.0 s")
    assert capfd.readouterr().err.splitlines() == [
        "hive: load m",
        "hive: load m · weights 71 %",
        "hive: load m … 7.0 s",
        "queen: ready after 7.0 s",
    ]
