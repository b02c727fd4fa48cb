from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import trio

from rbee.errors import BadInputError
from rbee.keeper import output
from rbee.keeper.output import Output, StdoutClosedError


@contextmanager
def pipe_as_stdout() -> Iterator[int]:
    """Put a pipe where stdout is; yields its reading end."""
    saved = os.dup(1)
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(writing)
    try:
        yield reading
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        with suppress(OSError):
            os.close(reading)


async def test_data_goes_out_at_once_and_its_line_is_ended_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = Output()
    await out.data("a")
    assert capfd.readouterr().out == "a"
    await out.data("")
    out.settle()
    out.settle()
    await out.data("b\n")
    out.settle()
    assert capfd.readouterr().out == "\nb\n"


async def test_narration_goes_to_stderr_only(capfd: pytest.CaptureFixture[str]) -> None:
    out = Output()
    await out.narrate("hive", "start", "a worker")
    await out.narrate("queen", "ready", "after 0.1 s")
    assert capfd.readouterr() == ("", "hive: start a worker\nqueen: ready after 0.1 s\n")


async def test_what_others_say_does_not_steer_the_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    await Output().narrate("hive", "load", "a\x1b[2Jb\nerror: c")
    output.print_error(BadInputError("two\nlines\x1b]0;x\x07", hint="\u202etxt"))
    output.note("note\x1b[2J")
    output.print_rows(["a"], [{"a": "one\ntwo\x1b[2J"}], as_json=False)
    output.print_facts({"a": "one\ntwo\x1b[2J\udcff"}, as_json=False)
    out, err = capfd.readouterr()
    assert err == (
        "hive: load a\\x1b[2Jb\\nerror: c\nerror: two\nlines\\x1b]0;x\\x07\n  hint: \\u202etxt\n"
        "note\\x1b[2J\n"
    )
    assert out == "A\none\\ntwo\\x1b[2J\na: one\ntwo\\x1b[2J\\udcff\n"


async def test_quiet_data_stays_off_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    out = Output(quiet_data=True)
    await out.data("a")
    out.settle()
    assert capfd.readouterr().out == ""


async def test_a_reader_that_went_away_is_told() -> None:
    with pipe_as_stdout() as reading:
        os.close(reading)
        with pytest.raises(StdoutClosedError) as caught:
            await Output().data("a")
    assert caught.value.exit_code == 0


async def test_a_slow_reader_can_be_waited_for_and_given_up() -> None:
    with pipe_as_stdout() as reading:
        with trio.move_on_after(0.05) as scope:
            await Output().data("x" * 1_000_000)
        assert scope.cancelled_caught
        assert os.read(reading, 100) == b"x" * 100


async def test_a_slow_reader_gets_every_byte() -> None:
    text, got = "0123456789" * 30_000, b""
    with pipe_as_stdout() as reading, trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Output().data, text)
            while len(got) < len(text):
                await trio.lowlevel.wait_readable(reading)
                got += os.read(reading, 65536)
    assert got.decode() == text


def test_an_error_is_a_line_its_log_and_a_hint(capfd: pytest.CaptureFixture[str]) -> None:
    output.print_error(BadInputError("no", hint="yes", log="one\ntwo\n"))
    assert capfd.readouterr().err == "error: no\n  log: one\n  log: two\n  hint: yes\n"


def test_tables_are_aligned(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": "a", "worker_id": None}, {"id": "long one", "worker_id": 0}]
    output.print_rows(("id", "worker_id"), rows, as_json=False)
    assert capfd.readouterr().out == "ID        WORKER ID\na         -\nlong one  0\n"
    output.print_rows(("id",), rows, as_json=True)
    assert capfd.readouterr().out.startswith('[{"id": "a"')
    output.print_rows(("id",), [], as_json=False)
    output.print_rows(("id",), [], as_json=True)
    assert capfd.readouterr().out == "[]\n"


def test_facts_are_aligned(capfd: pytest.CaptureFixture[str]) -> None:
    output.print_facts({"a": 1, "home_of": ""}, as_json=False)
    assert capfd.readouterr().out == "a:       1\nhome of: -\n"


@pytest.mark.parametrize(("size", "told"), [(5, "5 B"), (2048, "2.0 KiB"), (5 << 40, "5.0 TiB")])
def test_sizes_are_told_for_people(size: int, told: str) -> None:
    assert output.human_bytes(size) == told
