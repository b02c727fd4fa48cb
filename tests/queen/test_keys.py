"""Named keys: what they open, how much, and that a change of the file is a change of them."""

from __future__ import annotations

import logging
import os
from hashlib import sha256
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from rbee.config import ConfigError, KeyConfig, load_config
from rbee.errors import ForbiddenError, RateLimitedError
from rbee.queen.keys import MINUTE, ROUNDING, Key, Keys

SECRET = b"alices"
DIGEST = sha256(SECRET).hexdigest()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def key(**limits: object) -> Key:
    return Key("alice", b"", KeyConfig(sha256=DIGEST, **limits))


# which ----------------------------------------------------------------------------------------
def test_a_key_is_found_by_its_hash_or_its_file(tmp_path: Path) -> None:
    file = tmp_path / "bob"
    file.touch(mode=0o600)
    file.write_text("bobs\n")
    path = write(tmp_path, f'[keys.alice]\nsha256 = "{DIGEST}"\n[keys.bob]\nfile = "{file}"\n')
    keys = Keys(path)
    found = [keys.find(sent) for sent in (SECRET, b"bobs", b"bob", DIGEST.encode())]
    assert [one and one.name for one in found] == ["alice", "bob", None, None]
    assert SECRET.decode() not in repr(found)
    assert DIGEST not in repr(found)


def test_a_change_of_the_files_is_one_of_the_keys(tmp_path: Path) -> None:
    file = tmp_path / "bob"
    file.touch(mode=0o600)
    file.write_text("bobs")
    alice = f'[keys.alice]\nsha256 = "{DIGEST}"\n'
    path = write(tmp_path, f'{alice}[keys.bob]\nfile = "{file}"\n')
    keys = Keys(path)
    before = keys.find(SECRET)
    assert before is not None
    file.write_text("bobs-new")
    assert (keys.find(b"bobs"), keys.find(b"bobs-new") is None) == (None, False)
    write(tmp_path, f"{alice}requests_at_once = 3\n")
    assert keys.find(b"bobs-new") is None
    assert keys.find(SECRET) is before  # what it has used is not forgotten
    assert before.limits.requests_at_once == 3
    path.unlink()
    assert keys.find(SECRET) is None


def test_a_key_file_that_others_may_read_opens_nothing_and_hurts_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "bob"
    file.write_text("bobs")
    os.chmod(file, 0o644)  # noqa: PTH101
    keys = Keys(
        write(tmp_path, f'[keys.bob]\nfile = "{file}"\n[keys.alice]\nsha256 = "{DIGEST}"\n')
    )
    with caplog.at_level(logging.WARNING):
        assert keys.find(b"bobs") is None
        assert keys.find(SECRET) is not None
    assert len(caplog.records) == 1
    assert "bobs" not in caplog.text


def test_a_broken_file_leaves_the_keys_as_they_were(tmp_path: Path) -> None:
    keys = Keys(write(tmp_path, f'[keys.alice]\nsha256 = "{DIGEST}"\n'))
    assert keys.find(SECRET) is not None
    write(tmp_path, "[keys.alice\n")
    assert keys.find(SECRET) is not None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("keys = 1", "keys"),
        ("[keys.a]", "either sha256 or file"),
        ('[keys.a]\nsha256 = "00"', "64 hexadecimal"),
        (f'[keys.a]\nsha256 = "{DIGEST}"\nfile = "x"', "either"),
        (f'[keys.a]\nsha256 = "{DIGEST}"\nrequests_per_minute = 0', "at least 1"),
        (f'[keys.a]\nsha256 = "{DIGEST}"\nsecret = 0', "keys.a.secret"),
        (f'[keys."a b"]\nsha256 = "{DIGEST}"', "letters"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(write(tmp_path, text))


# how much -------------------------------------------------------------------------------------
async def test_no_more_requests_run_at_once_than_may() -> None:
    limited = key(requests_at_once=2)
    with limited.using(), limited.holding():
        with pytest.raises(RateLimitedError) as caught, limited.using():
            pass
        assert caught.value.details == {"retry_after": 1}
    with limited.using():
        pass


@given(
    most=st.integers(1, 4), pauses=st.lists(st.floats(0, 90, allow_subnormal=False), max_size=30)
)
def test_no_minute_has_more_requests_than_may_and_who_waits_as_told_is_let_in(
    most: int, pauses: list[float]
) -> None:
    async def main() -> None:
        limited, let_in = key(requests_per_minute=most), []
        for pause in pauses:
            await trio.sleep(pause)
            try:
                with limited.using():
                    let_in.append(trio.current_time())
            except RateLimitedError as exc:
                await trio.sleep(exc.details["retry_after"])
                with limited.using():
                    let_in.append(trio.current_time())
        for first, beyond in zip(let_in, let_in[most:], strict=False):
            assert beyond - first >= MINUTE - 2 * ROUNDING

    trio.run(main, clock=MockClock(autojump_threshold=0))


# what -----------------------------------------------------------------------------------------
def test_a_model_may_be_asked_for_under_any_name_of_those_allowed() -> None:
    def meanings(name: str) -> frozenset[str]:
        return frozenset({name, "hf:org/repo"} if name in ("bee", "org/repo") else {name})

    limited = key(models=("bee",))
    assert limited.may_use("org/repo", meanings)
    assert key().may_use("other", meanings)
    with pytest.raises(ForbiddenError, match=r"'alice' may not use other; it may use bee"):
        limited.check_model("other", meanings)
