"""The root of a daemon: what it says to its owner, and every way to end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import pytest

from rbee import guard
from rbee.daemon import locked, read_run_file, write_run_file
from rbee.errors import ConflictError
from rbee.home import Home, write_atomic
from rbee.wire import codec
from rbee.wire.messages import DaemonStart, Hello

slow = pytest.mark.slow

START = f"start {codec.dumps(DaemonStart('queen-1', 'secret', '/run')).decode()}\n"
HELLO = Hello("hive", "hive-1", "1", 5, "http://127.0.0.1:9")
DAEMON = """
import os, sys, trio
from rbee import daemon
from rbee.errors import ConflictError
from rbee.wire.messages import Hello

async def main(root):
    {before}
    root.say_hello(Hello("hive", root.start.owner if root.start else "", "1", os.getpid(), "http://x"))
    try:
        await trio.sleep_forever()
    finally:
        os.write(2, f"cleaned, owner gone: {{root.owner_gone}}\\n".encode())

os._exit(daemon.run_daemon("rbee-hive", main, owned="owned" in sys.argv))
"""


@contextmanager
def daemon(before: str = "", *, owned: bool = True) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", DAEMON.format(before=before), *(["owned"] if owned else [])]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        yield child


def hello_of(child: subprocess.Popen[str]) -> dict:
    child.stdin.write(START)
    child.stdin.flush()
    kind, _, text = child.stdout.readline().partition(" ")
    assert kind == "hello"
    return json.loads(text)


@slow
@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("stop\n", "the owner said stop"),
        ("beat 1\nbeat 2\nstop\n", "the owner said stop"),
        ("", "the owner is gone"),
        ("hello\n", "unknown line 'hello' on the lifeline"),
        ("x" * 70_000, "unknown line 'overlong' on the lifeline"),
    ],
)
def test_an_owned_daemon_says_hello_and_ends_by_its_lifeline(end: str, told: str) -> None:
    with daemon() as child:
        assert hello_of(child)["id"] == "queen-1"
        _, log = child.communicate(end)
    assert child.returncode == 0
    assert f"stopping: {told}" in log
    assert f"cleaned, owner gone: {told == 'the owner is gone'}" in log


@slow
def test_after_hello_all_output_goes_to_the_log() -> None:
    with daemon("import atexit; print('early', file=sys.stderr)") as child:
        hello_of(child)
        child.stdin.close()
        assert child.stdout.read() == ""
        assert child.wait() == 0


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_without_an_owner_stdin_is_not_read_and_a_signal_ends_it(number: signal.Signals) -> None:
    with daemon(owned=False) as child:
        child.stdin.write("nonsense\n")
        child.stdin.close()
        while "listens at" not in (line := child.stderr.readline()):
            assert line
        child.send_signal(number)
        assert "cleaned" in child.stderr.read()
        assert child.stdout.read() == ""
        assert child.wait() == 0


@slow
def test_an_error_before_hello_is_one_line_for_the_owner() -> None:
    with daemon(
        "raise ConflictError('port taken', hint='use another', code='port_taken')"
    ) as child:
        out, log = child.communicate(START)
    kind, _, text = out.partition(" ")
    assert kind == "error"
    assert json.loads(text) == {
        "code": "port_taken",
        "message": "port taken",
        "hint": "use another",
    }
    assert child.returncode == 1
    assert "Traceback" not in log


@slow
def test_an_error_without_an_owner_is_for_people() -> None:
    with daemon("raise ConflictError('port taken', hint='use another')", owned=False) as child:
        out, log = child.communicate()
    assert (out, child.returncode) == ("", 1)
    assert log.endswith("error: port taken\n  hint: use another\n")
    assert "Traceback" not in log


@slow
def test_a_bug_is_told_and_its_traceback_is_in_the_log() -> None:
    with daemon("raise KeyError('bug')") as child:
        out, log = child.communicate(START)
    assert json.loads(out.partition(" ")[2])["message"] == "KeyError: 'bug'"
    assert child.returncode == 1
    assert "Traceback" in log


@slow
@pytest.mark.parametrize(
    "sent", ["", "hello\n", "start {\n", "start {}\n", START.replace("secret", "")]
)
def test_owned_without_an_owner_is_refused_without_a_traceback(sent: str) -> None:
    with daemon() as child:
        out, log = child.communicate(sent)
    assert child.returncode in (1, 2)
    assert out == ""
    assert log.startswith("error: ")
    assert "Traceback" not in log


@slow
def test_no_program_listens_anywhere_without_a_token(home: Home) -> None:
    write_atomic(home.root / "empty", "\n")
    listen = ["--host", "0.0.0.0", "--port", "0", "--token-file", str(home.root / "empty")]
    programs = [["rbee.queen", "daemon"], ["rbee.hive", "daemon"], ["rbee.worker", "--model", "m"]]
    popens = [
        subprocess.Popen(
            [sys.executable, "-m", *words, *listen],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for words in programs
    ]  # fmt: skip
    for popen in popens:
        out, log = popen.communicate(timeout=60)
        assert (popen.returncode, out) == (1, "")
        assert log.startswith(f"error: the token file {home.root}/empty is empty\n  hint: rm ")
    assert [path.name for path in home.run.iterdir() if path.suffix == ".json"] == []


# run files and locks --------------------------------------------------------------------------
def test_a_living_daemons_run_file_is_read(home: Home) -> None:
    write_run_file(home.hive_file, HELLO, "operator", home.token_file)
    record = read_run_file(home.hive_file)
    assert (record.url, record.pid, record.owner) == (HELLO.url, os.getpid(), "operator")
    assert home.hive_file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "change",
    [{"boot_id": "another"}, {"start_time": 0}, {"start_time": 5}, {"pid": 2**22 + 1}],
)
def test_the_run_file_of_a_dead_daemon_is_none(home: Home, change: dict) -> None:
    write_run_file(home.hive_file, HELLO, "operator", home.token_file)
    record = attrs.evolve(read_run_file(home.hive_file), **change)
    home.hive_file.write_bytes(codec.dumps(record))
    assert read_run_file(home.hive_file) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_run_file_is_none(home: Home, text: str) -> None:
    assert read_run_file(home.hive_file) is None
    home.hive_file.write_text(text)
    assert read_run_file(home.hive_file) is None


def test_one_daemon_of_a_kind_per_home(home: Home) -> None:
    with locked(home.queen_file, "queen"):
        write_run_file(home.queen_file, HELLO, "operator", home.token_file)
        with (
            pytest.raises(
                ConflictError, match=rf"runs already at http.*\(pid {os.getpid()}\)"
            ) as info,
            locked(home.queen_file, "queen"),
        ):
            pytest.fail("the body ran")
        assert info.value.code == "queen_running"
        with locked(home.hive_file, "hive"):
            pass
    with locked(home.queen_file, "queen"):
        pass


def test_an_error_of_the_body_is_its_own(home: Home) -> None:
    with pytest.raises(BlockingIOError), locked(home.queen_file, "queen"):
        raise BlockingIOError


@slow
def test_a_stale_lock_file_holds_nobody(home: Home) -> None:
    code = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 66), 2); os.kill(os.getpid(), 9)"
    )
    lock = home.queen_file.with_suffix(".lock")
    subprocess.run([sys.executable, "-c", code, str(lock)], check=False)
    assert lock.exists()
    with locked(home.queen_file, "queen"):
        assert guard.start_time(os.getpid()) > 0
