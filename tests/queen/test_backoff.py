"""How long a failed load is remembered, in simulated time."""

import itertools

import attrs
import pytest
import trio

from rbee.errors import BadInputError, InsufficientError, MachineError, RbeeError
from rbee.queen.backoff import LONGEST, Backoff
from rbee.wire.messages import HubAccess, StartWorker

REQUEST = StartWorker("words", engine="echo", engine_args={"a": "1"})
OTHER = StartWorker("words", engine="echo", engine_args={"a": "2"})
IDS = itertools.count()


def boom():
    return MachineError("boom", hint="look", log="tail")


def fail(backoff, error=None):
    """Note the failure of one more worker."""
    backoff.note_failure(REQUEST, f"worker-{next(IDS)}", error or boom())


async def pause_of(backoff):
    """Return the seconds until another try is possible."""
    start = trio.current_time()
    while True:
        try:
            backoff.check(REQUEST)
        except RbeeError:
            await trio.sleep(0.5)
        else:
            return trio.current_time() - start


async def test_after_the_first_each_failure_in_a_row_doubles_the_pause(autojump_clock):
    backoff = Backoff()
    pauses = []
    for _ in range(9):
        fail(backoff)
        pauses.append(await pause_of(backoff))
    assert pauses == [0, 1, 2, 4, 8, 16, 32, LONGEST, LONGEST]


async def test_what_the_user_can_put_right_he_may_try_again_soon(autojump_clock):
    backoff = Backoff()
    for pause in (0, 1, 1, 1, 1):
        fail(backoff, BadInputError("damaged"))
        assert await pause_of(backoff) == pause


async def test_meanwhile_the_error_is_told_again_with_when_to_try(autojump_clock):
    backoff = Backoff()
    fail(backoff)
    fail(backoff)
    await trio.sleep(0.5)
    with pytest.raises(MachineError) as info:
        backoff.check(REQUEST)
    assert info.value.message.startswith("boom\n")
    assert "at try 2" in info.value.message
    assert info.value.hint == "look"
    assert info.value.details == {"log": "tail", "retry_after": 0.5}


async def test_a_success_or_a_long_time_without_a_try_begins_anew(autojump_clock):
    backoff = Backoff()
    for _ in range(5):
        fail(backoff)
    backoff.note_success(REQUEST)
    assert await pause_of(backoff) == 0
    for _ in range(5):
        fail(backoff)
    await trio.sleep(16 + LONGEST + 1)
    fail(backoff)
    assert await pause_of(backoff) == 0


async def test_another_way_to_start_the_model_is_not_held_up(autojump_clock):
    backoff = Backoff()
    fail(backoff)
    fail(backoff)
    backoff.check(OTHER)


async def test_what_passes_by_itself_is_not_remembered(autojump_clock):
    backoff = Backoff()
    for _ in range(3):
        fail(backoff, InsufficientError("full", code="insufficient_memory"))
    backoff.check(REQUEST)


async def test_all_who_waited_for_one_worker_are_one_failure(autojump_clock):
    backoff = Backoff()
    fail(backoff)
    for _ in range(50):
        backoff.note_failure(REQUEST, "worker-1", boom())
    assert await pause_of(backoff) == 1


async def test_another_token_is_tried_at_once_and_none_is_kept(autojump_clock):
    backoff = Backoff()
    first, second = (attrs.evolve(REQUEST, hub=HubAccess(token=t)) for t in ("hf_one", "hf_two"))
    for number in range(2):
        backoff.note_failure(first, f"worker-{number}", boom())
    with pytest.raises(RbeeError):
        backoff.check(first)
    backoff.check(second)
    assert "hf_one" not in repr(vars(backoff))
