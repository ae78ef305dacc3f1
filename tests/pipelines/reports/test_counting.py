"""Sizes and times in sentences."""

import pytest

from pipelines.reports.counting import format_bytes, time_left


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1500, "1.5 kB"), (2_500_000, "2.5 MB")]
)
def test_sizes_have_a_unit_of_which_there_is_one(number, text):
    assert format_bytes(number, digits=1) == text


def test_the_time_left_is_in_whole_minutes():
    assert time_left(59) == time_left(0) == "under a minute left"
    assert [time_left(seconds) for seconds in (60, 200)] == ["about 1 min left", "about 3 min left"]
