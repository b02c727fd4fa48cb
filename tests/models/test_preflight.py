from __future__ import annotations

from pathlib import Path

import pytest

from rbee.errors import InsufficientError
from rbee.models.preflight import (
    available_memory,
    check_disk,
    check_memory,
    human,
)


def test_too_small_a_disk_tells_needed_and_free(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(InsufficientError, match=r"needed 1048576.0 TiB, free .* at ") as caught:
        check_disk(tmp_path, 2**60)
    assert caught.value.details["required"] == 2**60
    assert 0 < caught.value.details["available"] < 2**60
    assert caught.value.http_status == 507


def test_too_little_memory_tells_needed_and_available() -> None:
    check_memory(10, available=10)
    with pytest.raises(InsufficientError, match=r"needed 2.0 GiB, available 1.0 GiB") as caught:
        check_memory(2 * 2**30, available=2**30)
    assert caught.value.details == {"required": 2 * 2**30, "available": 2**30}
    assert caught.value.hint


def test_memory_that_the_kernel_does_not_tell_refuses_nothing(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "meminfo") is None
    assert (available_memory() or 0) > 2**20


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (3 * 2**40, "3.0 TiB")]
)
def test_sizes_are_written_for_people(size: int, text: str) -> None:
    assert human(size) == text
