from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable

import attrs
import pytest
import trio

from rbee import __version__
from rbee.client import KEEP_A_QUEEN
from rbee.config import Config, QueenConfig
from rbee.errors import (
    ChildExitedError,
    ConflictError,
    MachineError,
    PeerError,
    RbeeError,
    UnavailableError,
)
from rbee.home import Home, write_atomic
from rbee.keeper import queen as keeper_queen
from rbee.keeper.queen import (
    QueenAccess,
    open_queen,
    open_running_queen,
)
from rbee.keeper.root import first_error
from rbee.running import find_run_file, queen_token
from rbee.testing.processes import LeakCheck
from tests.keeper.fake_queen import TOKEN, FakeQueen, note, open_fake
from tests.trees import holders

ANY_PORT = Config(queen=QueenConfig(port=0))


async def running(home: Home, **changes: object) -> QueenAccess | None:
    async with open_running_queen(home, **changes) as queen:  # type: ignore[arg-type]
        return queen


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


async def test_the_running_queen_of_the_home_is_used_with_its_token(home: Home) -> None:
    async with open_fake(home=home) as (_, url), open_queen(home, Config()) as queen:
        assert (queen.url, queen.owned, queen.owner) == (url, False, "operator")
        assert await queen.client.workers()


async def test_another_commands_queen_is_used_with_the_token_it_left(home: Home) -> None:
    fake = FakeQueen(owner="keeper-1")
    async with open_fake(fake, home), open_queen(home, Config()) as queen:
        assert (queen.owned, queen.owner) == (False, "keeper-1")
        assert await queen.client.workers()


async def test_without_a_run_file_no_queen_runs(home: Home) -> None:
    assert await running(home) is None


@pytest.mark.parametrize("damage", ["dead", "reused pid", "other boot", "garbage"])
async def test_a_stale_run_file_is_no_queen(home: Home, damage: str) -> None:
    note(home, FakeQueen(), "http://127.0.0.1:1", pid=dead_pid() if damage == "dead" else 0)
    text = home.queen_file.read_text()
    record = find_run_file(home)
    assert (record is None) == (damage == "dead")
    if damage == "reused pid":
        assert record is not None
        text = text.replace(str(record.start_time), str(record.start_time + 1))
    elif damage == "other boot":
        assert record is not None
        text = text.replace(record.boot_id, "0" * 36)
    elif damage == "garbage":
        text = text[:20]
    home.queen_file.write_text(text)
    assert await running(home) is None


async def test_a_url_that_was_asked_for_wins(home: Home) -> None:
    home.token_file.write_text(TOKEN)
    asked = FakeQueen(home="/another/home")
    async with (
        open_fake(home=home),
        open_fake(asked) as (_, url),
        open_queen(home, Config(), url=url + "/") as queen,
    ):
        assert queen.url == url
        assert await queen.client.workers()


async def test_a_token_file_can_be_named(home: Home) -> None:
    path = home.root / "other-token"
    write_atomic(path, TOKEN + "\n")
    async with open_fake() as (_, url):
        async with open_queen(home, Config(), url=url, token_file=str(path)) as queen:
            assert await queen.client.workers()
        with pytest.raises(MachineError, match="missing"):
            await running(home, url=url, token_file=str(home.root / "missing"))


@pytest.mark.parametrize(
    ("url", "is_sent"),
    [
        ("http://127.0.0.1:8080", True),
        ("http://localhost:8080", True),
        ("http://[::1]:8080", True),
        ("http://elsewhere:8080", False),
        ("http://192.0.2.1:8080", False),
        ("http://localhost.example:8080", False),
        ("http://127.0.0.1@elsewhere", False),
        ("nonsense", False),
        ("http://[", False),
    ],
)
def test_the_homes_token_is_for_this_machine_unless_a_file_is_named(
    home: Home, url: str, is_sent: bool
) -> None:
    write_atomic(home.token_file, TOKEN)
    assert queen_token(home, None, url) == (TOKEN if is_sent else "")
    assert queen_token(home, None, url, str(home.token_file)) == TOKEN


async def test_a_url_where_nobody_answers_is_told(home: Home) -> None:
    with pytest.raises(UnavailableError, match="no queen answers") as caught:
        await running(home, url="http://127.0.0.1:1")
    assert caught.value.hint.startswith("curl")


async def test_a_queen_of_another_version_is_refused_with_both_named(home: Home) -> None:
    async with open_fake(FakeQueen(version="0.0.7"), home):
        with pytest.raises(ConflictError) as caught:
            await running(home)
        assert "0.0.7" in caught.value.message
        assert __version__ in caught.value.message
        assert caught.value.hint == "rbee-keeper queen stop"
        assert await running(home, any_version=True)


async def test_a_queen_of_another_home_is_refused(home: Home) -> None:
    async with open_fake(FakeQueen(home="/elsewhere"), home):
        with pytest.raises(ConflictError, match="/elsewhere"):
            await running(home)


async def test_a_queen_that_does_not_answer_is_told(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_queen, "HEALTH_LIMIT", 0.2)
    async with open_fake(FakeQueen(silent=True), home):
        with pytest.raises(UnavailableError, match="does not answer") as caught:
            await running(home)
        assert "queen stop" in caught.value.hint


@pytest.mark.slow
async def test_a_queen_that_is_just_ending_is_waited_for(home: Home) -> None:
    ending = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    note(home, FakeQueen(), "http://127.0.0.1:1", pid=ending.pid)
    with trio.fail_after(10):
        assert await running(home) is None
    ending.wait()


# a queen of our own ---------------------------------------------------------------------------
@pytest.mark.slow
async def test_without_one_a_queen_is_owned_and_ends_with_the_block(
    home: Home, leaks: LeakCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = f"hf_{leaks.nonce}_token"
    monkeypatch.setenv("HF_TOKEN", token)
    with trio.fail_after(30):
        async with open_queen(home, ANY_PORT) as queen:
            assert queen.owned
            assert await queen.client.workers() == []
            assert holders("environ", token) == set()  # each request takes it along
            record = find_run_file(home)
            assert record is not None
            assert record.owner == queen.owner
            leaks.tree.refresh(os.getpid())
            # who comes second uses it
            async with open_queen(home, ANY_PORT) as second:
                assert (second.url, second.owned) == (queen.url, False)
                assert await second.client.workers() == []
        await leaks.wait_clean(1)
    assert find_run_file(home) is None


@pytest.mark.slow
async def test_two_at_once_get_one_queen(home: Home, leaks: LeakCheck) -> None:
    found: list[QueenAccess] = []
    done = trio.Event()

    async def use() -> None:
        async with open_queen(home, ANY_PORT) as queen:
            found.append(queen)
            if len(found) == 3:
                done.set()
            await done.wait()

    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(use)
    assert len({queen.url for queen in found}) == 1
    assert [queen.owned for queen in found].count(True) == 1


async def kill_then_break(queen: QueenAccess) -> None:
    os.kill(queen.health.pid, signal.SIGKILL)
    raise PeerError("the stream broke")  # as the client tells it, before the death is seen


async def shut_down(queen: QueenAccess) -> None:
    await queen.client.shutdown()
    await trio.sleep_forever()


@pytest.mark.slow
@pytest.mark.parametrize("end", [kill_then_break, shut_down])
async def test_our_queens_unasked_end_is_told_with_its_log(
    home: Home, leaks: LeakCheck, end: Callable[[QueenAccess], Awaitable[None]]
) -> None:
    async def use() -> None:
        async with open_queen(home, ANY_PORT) as queen:
            await end(queen)

    with trio.fail_after(30), pytest.raises(BaseExceptionGroup) as caught:
        await use()
    error = first_error(caught.value)
    assert isinstance(error, ChildExitedError)
    assert "queen" in error.message
    assert error.details["log"]


@pytest.mark.slow
async def test_a_queen_that_cannot_start_says_why(
    home: Home, leaks: LeakCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_queen, "COMMAND", (sys.executable, "-c", "raise SystemExit('ouch')"))
    with trio.fail_after(30), pytest.raises((BaseExceptionGroup, RbeeError)) as caught:
        async with open_queen(home, ANY_PORT):
            pass
    error = first_error(caught.value)
    assert isinstance(error, ChildExitedError)
    assert "ouch" in error.details["log"]


@pytest.mark.slow
async def test_a_queen_that_still_holds_the_lock_is_waited_for(
    home: Home, leaks: LeakCheck
) -> None:
    fd = os.open(home.queen_file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)

    async def let_go() -> None:
        await trio.sleep(1)
        os.close(fd)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(let_go)
            async with open_queen(home, ANY_PORT) as queen:
                assert queen.owned


async def test_a_pause_longer_than_the_lease_is_why_our_queen_ended(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    @attrs.define
    class Dead:
        async def wait(self) -> int:
            await trio.sleep(12)
            return 0

        def ended(self, status: int) -> ChildExitedError:
            return ChildExitedError("queen ended unasked with code 0")

    async def hang(self: object, every: float = 1.0) -> None:
        await trio.sleep_forever()  # a stopped process ticks no more

    monkeypatch.setattr(keeper_queen.Pauses, "keep_watching", hang)
    with pytest.raises(BaseExceptionGroup) as caught:
        await keeper_queen._raise_when_dead(Dead(), 10.0)  # type: ignore[arg-type]
    error = first_error(caught.value)
    assert error is not None
    assert "stopped for 12 s" in error.message
    assert error.hint == KEEP_A_QUEEN
