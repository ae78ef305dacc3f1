"""Counts and sizes in sentences."""

import pytest

from pipelines.reports.counting import count, size


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1500, "1.5 kB"), (2_500_000, "2.5 MB")]
)
def test_sizes_have_a_unit_of_which_there_is_one(number, text):
    assert size(number) == text


def test_nouns_agree_with_their_number():
    assert [count(n, "shard") for n in (0, 1, 2000)] == ["0 shards", "1 shard", "2,000 shards"]
