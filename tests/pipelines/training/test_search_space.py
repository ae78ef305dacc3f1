"""Points of a sweep's space."""

import random

import pytest

from model.errors import ConfigError
from pipelines.recipe.loading import recipe_from_dict
from pipelines.training.search_space import (
    check_metric,
    check_space,
    combinations,
    decode,
    encode,
    extreme_models,
    search_of,
    short_label,
)


def space(values, **changes):
    return recipe_from_dict({"sweep": {"space": values, **changes}})


RANGES = {
    "train.optimizer.learning_rate": {"log_uniform": [1e-3, 1e-1]},
    "train.grad_clip": {"uniform": [0.5, 2.0]},
    "model.index_topk": {"int": [2, 5]},
    "model.kv_format": {"choice": ["fp8", "bf16"]},
    "model.layers": [["csa", "hca"], ["hca", "csa"]],
}


def test_random_points_lie_within_the_ranges():
    points = combinations(space(RANGES, trials=200, search="random"))
    rates, clips, topk = ([p[key] for p in points] for key in list(RANGES)[:3])
    assert len(points) == 200 and all(1e-3 <= rate <= 1e-1 for rate in rates)
    assert 60 < sum(rate < 1e-2 for rate in rates) < 140  # uniform in the logarithm
    assert all(0.5 <= clip <= 2.0 for clip in clips) and set(topk) == {2, 3, 4, 5}
    assert {point["model.kv_format"] for point in points} == {"fp8", "bf16"}
    assert points == combinations(space(RANGES, trials=200, search="random"))


def test_points_of_a_grid_are_drawn_without_building_the_grid():
    keys = ["model.csa_ratio", "model.hca_ratio", "model.index_topk", "run.seed"]
    keys += [f"train.{name}" for name in ("batch_rows", "grad_clip", "log_every", "validate_every", "warmup_steps")]
    keys.append("train.validation_rows")
    points = combinations(space({key: list(range(1, 11)) for key in keys}, trials=20))
    assert len(points) == 20 and len({repr(point) for point in points}) == 20
    assert all(list(point) == keys and set(point.values()) <= set(range(1, 11)) for point in points)
    more = combinations(space({key: list(range(1, 101)) for key in keys}, trials=20))  # more than a range can count
    assert len(more) == 20 and max(max(point.values()) for point in more) > 90
    with pytest.raises(ConfigError, match=r"^sweep\.trials: is not set, but the grid .* has 10,000,000,000 points$"):
        check_space(space({key: list(range(1, 11)) for key in keys}))


def test_random_points_of_a_grid_are_those_of_its_list():
    values = {"model.csa_ratio": [2, 4, 8], "model.kv_format": ["fp8", "bf16"], "model.index_topk": [1, 2, 3, 4]}
    grid = combinations(space(values))
    assert len(grid) == 24 and grid[1] == {"model.csa_ratio": 2, "model.kv_format": "fp8", "model.index_topk": 2}
    drawn = combinations(space(values, trials=7))
    assert drawn == random.Random(0).sample(grid, 7)


def test_extreme_models_have_both_ends_of_ranges_and_skip_invalid_ones():
    values = {
        "model.csa_ratio": {"int": [2, 7]},
        "model.index_format": ["fp4", "bf16"],
        "model.index_head_dim": [32, 48],
        "train.grad_clip": {"uniform": [0.5, 2.0]},
    }
    found = [(m.csa_ratio, m.index_format, m.index_head_dim) for m in extreme_models(space(values, trials=3))]
    assert {ratio for ratio, _, _ in found} == {2, 7} and len(found) == len(set(found)) < 8
    assert (2, "fp4", 32) in found and (2, "fp4", 48) not in found  # no power of two
    assert not list(extreme_models(space({"model.mixer_options.dsa.kv_lora_rank": [64, 128]})))


def test_a_space_with_a_range_is_searched_by_optuna():
    assert search_of(space(RANGES, trials=3)) == "optuna"
    assert search_of(space({"model.csa_ratio": [2, 4]})) == "random"
    assert search_of(space({"model.csa_ratio": [2, 4]}, search="optuna", trials=1)) == "optuna"


def test_layer_schedules_survive_as_categories_of_optuna():
    settings = {"model.layers": ["csa", "hca"], "model.kv_format": "fp8", "model.qat": True}
    assert decode({key: encode(value) for key, value in settings.items()}) == settings
    assert isinstance(encode(settings["model.layers"]), str)
    assert short_label({**settings, "model.csa_ratio": 4}) == "layers=csa,hca kv_format=fp8 qat=True csa=4"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"int": [5, 2]}, "the lower bound 5 is not below the upper bound 2"),
        ({"log_uniform": [0, 1]}, "log_uniform: expected bounds above 0, found 0"),
        ({"uniform": [0, 1], "int": [0, 1]}, "expected one of log_uniform, uniform and int, found uniform and int"),
        ({"normal": [0, 1]}, "expected a list of values or one of choice, log_uniform, uniform, int, found 'normal'"),
        ({"int": [1.5, 2]}, r"int\.0: expected a whole number"),
    ],
)
def test_bad_ranges_are_refused(values, message):
    with pytest.raises(ConfigError, match=rf"sweep\.space\.model\.index_topk\.?:? ?{message}"):
        space({"model.index_topk": values})


LOGGED = "validation/loss, validation/text_loss, validation/answer_loss, validation/recall"
SELECTION = "validation/indexer_kl, validation/recall_at_k, validation/recall_at_k_of_best, validation/choosing_share"


@pytest.mark.parametrize(
    ("metric", "layers", "kinds", "expected"),
    [
        ("validation/los", ["csa"], ["text", "mqar"], f"{LOGGED}, {SELECTION}"),
        ("validation/recall_at_k", ["hca"], ["text", "mqar"], LOGGED),
        ("validation/recall_at_k/layer_1", ["csa"], ["text", "mqar"], f"{LOGGED}, {SELECTION}"),
        ("validation/needle_recall", ["hca"], ["text", "mqar"], LOGGED),
        ("validation/recall", ["hca"], ["text"], "validation/loss, validation/text_loss"),
        ("validation/mtp_loss", ["hca"], ["text", "mqar"], LOGGED),
        ("train/loss", ["hca"], ["text"], "validation/loss, validation/text_loss"),
    ],
)
def test_a_metric_that_the_trials_do_not_log_is_refused_with_those_they_log(metric, layers, kinds, expected):
    recipe = recipe_from_dict({"model": {"layers": layers}, "sweep": {"metric": metric}})
    with pytest.raises(ConfigError) as caught:
        check_metric(recipe, [{}], kinds)
    assert str(caught.value) == f"sweep.metric: expected one of {expected}, found '{metric}'"
    known = recipe_from_dict({"model": {"layers": layers}, "sweep": {"metric": expected.split(", ")[-1]}})
    check_metric(known, [{}], kinds)


def test_a_metric_must_be_logged_by_every_valid_trial():
    values = {"model.layers": [["csa", "hca"], ["hca", "hca"]]}
    recipe = space(values, metric="validation/choosing_share")
    with pytest.raises(ConfigError, match=r"^sweep\.metric: expected one of .*, found 'validation/choosing_share'$"):
        check_metric(recipe, combinations(recipe), ["text"])
    check_metric(recipe, [{"model.layers": ["csa", "hca"]}, {"model.layers": ["unknown"]}], ["text"])


def test_overrides_that_no_trial_can_have_are_named():
    recipe = space({"model.csa_ratio": [2, 4]}, overrides={"train.stages.0.step": 3})
    with pytest.raises(ConfigError, match=r"^sweep\.overrides: train\.stages\.0\.step: unknown key"):
        check_space(recipe)
