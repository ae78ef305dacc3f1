"""The Pareto front of a sweep."""

import json

import pytest

from pipelines.reports.cache_measurement import BYTES_PER_TOKEN
from pipelines.reports.pareto import Point, SweepReport, figure, hypervolume, pareto_front, tables, verdict


def report(scores, **changes):
    """A sweep over one key with a point per (cache bytes, recall)."""
    points = [
        Point(
            f"topk={i}",
            {"model.index_topk": i, "model.kv_format": "fp8"},
            {BYTES_PER_TOKEN: cost, "validation/recall": recall, "validation/loss": 1 - recall},
            f"run{i}",
            10,
        )
        for i, (cost, recall) in enumerate(scores)
    ]
    values = {
        "name": "sweep", "command": "python -m pipelines sweep", "seed": 0, "metric": "validation/recall",
        "mode": "max", "length": 256, "budget": None, "points": points, "chosen": 0, "skipped": {},
    }  # fmt: skip
    return SweepReport(**{**values, **changes})


def test_dominated_and_nan_points_are_not_on_the_front():
    points = [(1.0, 0.5), (2.0, 0.9), (2.0, 0.8), (3.0, 0.9), (0.5, float("nan"))]
    assert pareto_front(points, higher=True) == {0, 1}
    assert pareto_front([(cost, -score) for cost, score in points], higher=False) == {0, 1}


def test_hypervolume_is_the_dominated_share_of_the_rectangle():
    # Rectangle 1..3 x 0..1: (1, 0.5) covers the lower half, (2, 1) the right half of the upper one.
    points = [(1.0, 0.5), (2.0, 1.0), (3.0, 0.0)]
    assert hypervolume(points, higher=True) == pytest.approx(0.5 + 0.25)
    assert hypervolume([(cost, -score) for cost, score in points], higher=False) == pytest.approx(0.75)
    assert hypervolume([*points, (2.5, 0.7)], higher=True) == pytest.approx(0.75)  # dominated
    assert hypervolume([(1.0, 1.0), (3.0, 0.0)], higher=True) == 1.0
    assert hypervolume([(1.0, float("nan"))], higher=True) == 0.0


def test_a_verdict_names_what_a_setting_costs_and_at_which_length():
    found = report([(10.0, 0.5), (20.0, 0.7), (30.0, 0.8), (40.0, 0.6)], chosen=2)
    text = "\n".join(verdict(found))
    assert "model.index_topk 0 → 3: cache 10.0 → 40.0 bytes per token, validation/recall 0.500 → 0.600 at 256 tokens (1 pair of trials that differ in nothing else)" in text  # fmt: skip  # noqa: E501
    assert "kv_format" not in text
    assert "from 30.0 to 10.0 bytes per token (÷ 3.00), and validation/recall goes from 0.800 to 0.500" in text
    assert text.endswith("Chosen: topk=2, 30.0 bytes per token, run run2.")


def of_settings(*points):
    """Return points of (settings, cache bytes, recall)."""
    return [
        Point(f"p{i}", settings, {BYTES_PER_TOKEN: cost, "validation/recall": recall}, f"run{i}", 10)
        for i, (settings, cost, recall) in enumerate(points)
    ]


def test_a_setting_is_compared_between_trials_that_differ_in_nothing_else():
    points = of_settings(
        ({"csa_ratio": 4, "topk": 4}, 50.0, 0.7),
        ({"csa_ratio": 4, "topk": 8}, 50.0, 0.8),
        ({"csa_ratio": 8, "topk": 8}, 25.0, 0.6),
    )
    text = "\n".join(verdict(report([], points=points)))
    assert "topk 4 → 8: cache 50.0 → 50.0 bytes per token, validation/recall 0.700 → 0.800" in text
    assert "csa_ratio 4 → 8: cache 50.0 → 25.0 bytes per token, validation/recall 0.800 → 0.600" in text


def test_halves_of_a_continuous_space_are_compared_and_said_to_differ_in_more():
    points = of_settings(*(({"rate": i / 10, "clip": i}, 10.0 + i, i / 4) for i in range(4)))
    text = "\n".join(verdict(report([], points=points)))
    assert "rate below 0.15 → from 0.15: cache 10.5 → 12.5" in text
    assert "(means over 2 and 2 trials, which also differ in other settings)" in text
    assert "rate" not in "".join(verdict(report([], points=points[:3]))).partition("Chosen")[0]


def test_scores_of_the_front_are_a_table():
    assert len(tables(report([(10.0, 0.5), (20.0, 0.7)]))) == 1
    by_length = {"mqar at 512 tokens": {"run0": 0.25, "run1": 0.5}, "needle at 512 tokens": {"run1": 1.0}}
    _, scores = tables(report([(10.0, 0.5), (20.0, 0.7)], by_length=by_length))
    assert scores.columns == ["task", "10.0 bytes per token, run run0", "20.0 bytes per token, run run1"]
    assert scores.rows == [["mqar at 512 tokens", "0.250", "0.500"], ["needle at 512 tokens", "-", "1.000"]]


def test_stopped_trials_do_not_count_in_the_verdict():
    points = report([(10.0, 0.9), (20.0, 0.7)]).points
    stopped = Point(**{**vars(points[0]), "steps": 5})
    found = report([], points=[stopped, points[1]], chosen=1)
    sentences = verdict(found)
    assert sentences[0].startswith("1 of 2 trials ran to the end (10 steps)")
    assert not any("Along the front" in sentence or "One point" in sentence for sentence in sentences)
    assert [row[-2] for row in tables(found)[0].rows] == ["stopped early", "chosen"] and found.front == {1}


def test_every_point_of_the_table_has_its_run():
    found = report([(10.0, 0.5), (20.0, 0.7), (30.0, 0.6)], chosen=1, skipped={"x": "invalid"})
    (trials,) = tables(found)
    assert [row[-2:] for row in trials.rows] == [["front", "run0"], ["chosen", "run1"], ["dominated", "run2"]]
    assert "invalid points skipped: 1" in trials.note


def test_a_report_survives_json_and_is_drawn():
    found = report([(10.0, 0.5), (20.0, 0.7)], budget=15.0)
    again = SweepReport.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    drawn = figure(again)
    assert "text and answers (nats per token)" in drawn.axes[1].get_title()
    text = [each.get_text() for each in drawn.axes[2].texts]
    assert text == ["1  topk=0  run0", "2  topk=1  run1"]


def test_the_front_is_drawn_as_a_staircase_from_each_point_to_the_next_larger_cache():
    for axes in figure(report([(20.0, 0.7), (10.0, 0.5), (30.0, 0.6)])).axes[:2]:
        [front] = [line for line in axes.get_lines() if line.get_label() == "Pareto front"]
        assert (front.get_drawstyle(), list(front.get_xdata())) == ("steps-post", [10.0, 20.0])
