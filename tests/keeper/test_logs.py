from __future__ import annotations

import pytest
import trio

from rbee.errors import BadInputError, NotFoundError
from rbee.home import Home
from rbee.keeper.far_logs import _refused, _shown
from rbee.keeper.flags import LogFlags
from rbee.keeper.logs import Tail, log_files, show_logs


@pytest.fixture
def logs(home: Home) -> Home:
    home.log_file("queen").write_text("q1\nq2\nq3\n")
    home.log_file("worker-1f").write_text("w1\n")
    return home


async def test_the_ends_of_all_logs_are_shown_with_their_names(
    logs: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    await show_logs(LogFlags(lines=2))
    assert capfd.readouterr().out == "queen     | q2\nqueen     | q3\nworker-1f | w1\n"


@pytest.mark.parametrize("worker", ["worker-1f", "1f"])
async def test_one_worker_has_its_log_alone(
    logs: Home, capfd: pytest.CaptureFixture[str], worker: str
) -> None:
    await show_logs(LogFlags(worker=worker))
    assert capfd.readouterr().out == "w1\n"


async def test_lines_as_json(logs: Home, capfd: pytest.CaptureFixture[str]) -> None:
    await show_logs(LogFlags(worker="1f", json=True))
    assert capfd.readouterr().out == '{"log": "worker-1f", "line": "w1"}\n'


async def test_no_logs_is_not_an_error(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    await show_logs(LogFlags())
    assert capfd.readouterr() == ("", "no logs yet\n")


async def test_what_is_not_there_is_told_with_what_there_is(logs: Home) -> None:
    with pytest.raises(NotFoundError, match="worker-1f"):
        log_files(logs, worker="nope")
    with pytest.raises(NotFoundError, match="localhost"):
        await show_logs(LogFlags(node="other"))
    with pytest.raises(BadInputError):
        await show_logs(LogFlags(node="Not A Node"))


async def test_following_shows_what_comes(logs: Home, capfd: pytest.CaptureFixture[str]) -> None:
    seen = ""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(show_logs, LogFlags(worker="1f", follow=True))
        with trio.fail_after(10):
            while "w1" not in seen:
                await trio.sleep(0.01)
                seen += capfd.readouterr().out
            with logs.log_file("worker-1f").open("a") as file:
                file.write("w2\nhalf")
            while "w2" not in seen:
                await trio.sleep(0.01)
                seen += capfd.readouterr().out
        nursery.cancel_scope.cancel()
    assert seen == "w1\nw2\n"


def test_a_rotated_or_cut_file_is_read_from_its_beginning(logs: Home) -> None:
    path = logs.log_file("queen")
    tail = Tail(path)
    assert tail.last(1) == ["q3"]
    fresh = path.with_suffix(".new")
    fresh.write_text("n1\n")
    fresh.replace(path)
    assert tail.more() == ["n1"]
    path.write_text("")
    assert tail.more() == []
    path.write_text("n2\n")
    assert tail.more() == ["n2"]
    path.unlink()
    assert tail.more() == []


def test_the_last_lines_of_a_big_file_are_found(logs: Home) -> None:
    path = logs.log_file("queen")
    path.write_text("".join(f"{number} {'x' * 1000}\n" for number in range(1000)))
    assert [line.split()[0] for line in Tail(path).last(100)] == [str(n) for n in range(900, 1000)]
    assert Tail(path).last(0) == []
    assert len(Tail(path).last(5000)) == 1000


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"log": "hive", "line": "a\\u001b[2J"}', "hive | a\\x1b[2J"),
        ("Welcome\x1b[2J", "Welcome\\x1b[2J"),
        ("[1]", "[1]"),
        ('{"log": "hive"}', '{"log": "hive"}'),
    ],
)
def test_what_another_machine_prints_is_shown_and_steers_nothing(line: str, shown: str) -> None:
    assert _shown(line, LogFlags()) == shown
    assert _shown(line, LogFlags(json=True)) == line


def test_a_refusal_there_suggests_another_command_than_the_one_that_failed() -> None:
    said = "error: no log of a worker 'x';\nthere are: none\n  hint: rbee-keeper worker list\n"
    error = _refused(said, "mac", LogFlags(worker="x"))
    assert error.message == "node mac: no log of a worker 'x';\nthere are: none"
    assert error.hint == "rbee-keeper logs --node mac"
    error = _refused("", "mac", LogFlags())
    assert (error.message, error.hint) == (
        "node mac: it did not say why", "rbee-keeper node check mac",
    )  # fmt: skip
