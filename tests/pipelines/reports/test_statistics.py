"""Intervals and paired tests, against values from tables of Student's t."""

import math

import pytest

from pipelines.reports.statistics import adjusted, estimate, format_p, paired, tokens_to, too_few


def test_an_interval_is_that_of_students_t():
    found = estimate([1.0, 2.0, 3.0])
    # s = 1, t(0.975, 2) = 4.303
    assert found.mean == 2.0 and found.half_width == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.half_width == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)


def test_a_paired_test_uses_the_differences_of_each_seed():
    reference, values = [1.0, 5.0, 9.0], [2.0, 7.0, 12.0]
    found = paired(values, reference)
    # Differences 1, 2, 3: t = 2 sqrt(3) = 3.464 with 2 degrees of freedom.
    assert found.mean == 2.0 and found.p == pytest.approx(0.0742, abs=1e-4)
    assert paired(reference, values).mean == -2.0
    with pytest.raises(ValueError, match="3 values cannot be paired with 2"):
        paired(values, reference[:2])


def test_fewer_than_three_seeds_give_neither_intervals_nor_tests():
    assert estimate([1.0, 2.0]).half_width is None and paired([1.0, 2.0], [0.0, 0.0]).p is None
    assert too_few([0, 1]) == "no intervals and no tests: they need at least 3 seeds, this run has 2 seeds"
    assert too_few([0, 1, 2]) is None


def test_equal_differences_have_no_p_value():
    assert paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]).p is None and format_p(None) == "-"


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_diverged_seed_leaves_neither_an_interval_nor_a_p_value(lost):
    found = estimate([1.0, lost, 2.0])
    assert not math.isfinite(found.mean) and found.half_width is None
    found = paired([1.0, lost, 2.0], [2.0, lost, 5.0])
    assert not math.isfinite(found.mean) and found.half_width is None and found.p is None


def test_p_values_are_corrected_as_holm_did():
    found = adjusted({"a": 0.01, "b": 0.04, "c": 0.03, "d": None})
    assert found == {"a": pytest.approx(0.03), "c": pytest.approx(0.06), "b": pytest.approx(0.06), "d": None}
    assert adjusted({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_tokens_to_a_loss_are_interpolated():
    line = [(0, 3.0), (10, 1.0), (20, 1.5), (30, 0.5)]
    assert [tokens_to(line, loss) for loss in (3.5, 2.0, 1.0, 0.75)] == [0, 5, 10, 27.5]
    assert math.isinf(tokens_to(line, 0.4))
