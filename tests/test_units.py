"""Sizes and times as people write them."""

import pytest

from rbee.errors import BadInputError
from rbee.units import seconds, size


@pytest.mark.parametrize(
    ("text", "value"),
    [("268435456", 1 << 28), ("256M", 1 << 28), ("1.5GiB", 3 << 29), ("2 kb", 2048)],
)
def test_a_size_is_bytes_or_a_number_with_a_unit(text, value):
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "much", "1X", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(BadInputError, match="is not a size"):
        size(text)


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("90", 90), ("10m", 600), ("1.5h", 5400), ("-1", -1), ("-5m", -1)]
)
def test_a_time_is_seconds_or_a_number_with_a_unit(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "soon", "5 weeks", "nan"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(BadInputError, match="is not a time"):
        seconds(text)
