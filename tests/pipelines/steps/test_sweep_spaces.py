"""Sweeps over ranges, formats and layer schedules on a Ray cluster."""

import json

import pytest

from model.errors import ConfigError
from pipelines.recipe.loading import overlay, recipe_from_dict, with_overrides
from pipelines.steps import sweep
from pipelines.tracking.mlflow_store import open_tracking


@pytest.fixture(scope="module")
def base(prepared, ray_cluster):
    stages = [{"attention": "sparse", "steps": 2}]
    return with_overrides(
        prepared,
        {"tracking.system_metrics_interval": None,
         "sweep.overrides": {"train.stages": stages, "train.validate_every": 1}},
    )  # fmt: skip


def test_optuna_searches_ranges_and_schedules_and_skips_invalid_points(base):
    space = {
        "train.optimizer.learning_rate": {"log_uniform": [1e-3, 1e-1]},
        "model.index_topk": {"int": [2, 60]},  # rows have at most 24 entries
        "model.layers": [["sliding", "csa", "hca"], ["csa", "hca", "csa"]],
        "model.kv_format": ["fp8", "bf16"],
    }
    recipe = with_overrides(base, {"sweep.name": "ranges", "sweep.space": space, "sweep.trials": 5, "run.seed": 3})
    result = sweep.run(recipe)
    report = json.loads((recipe.sweep_folder / "sweep.json").read_text())["result"]
    assert len(report["points"]) + len(report["skipped"]) == 5 and report["points"] and report["skipped"]
    assert all("is not below" in reason for reason in report["skipped"].values())
    for point in report["points"]:
        assert point["settings"]["model.index_topk"] < 48
        assert 1e-3 <= point["settings"]["train.optimizer.learning_rate"] <= 1e-1
        assert point["settings"]["model.layers"] in space["model.layers"]
    client = open_tracking(recipe).client
    for point in report["points"]:  # each point is linked to its run
        params = client.get_run(point["run_id"]).data.params
        assert int(params["model.index_topk"]) == point["settings"]["model.index_topk"]
    assert 0 <= client.get_run(result.run_id).data.metrics["sweep/hypervolume"] <= 1
    winner = overlay(recipe, recipe.sweep_folder / "winner.yaml")
    assert list(winner.model.layers) == result.winner.settings["model.layers"]


def test_a_task_that_does_not_exist_is_refused_before_any_trial(base):
    space = {"sweep.space": {"model.index_topk": [2, 3]}, "sweep.evaluate_front": True, "evaluate.tasks": ["ruler"]}
    recipe = with_overrides(base, {"sweep.name": "no-task", **space})
    with pytest.raises(ConfigError, match=r"^evaluate\.tasks: 'ruler' is not one of mqar, "):
        sweep.run(recipe)
    assert not recipe.sweep_folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, r"^sweep\.space: is empty"),
        ({"space": {"run.name": ["a", "b"]}}, r"^sweep\.space: 'run\.name' changes nothing in a trial"),
        ({"metric": "validation/los"}, r"^sweep\.metric: expected one of validation/loss, .*, found 'validation/los'"),
        ({"overrides": {"train.stages": []}}, r"^sweep\.overrides: train\.stages: must not be empty"),
    ],
)
def test_a_bad_sweep_is_refused_before_data_is_asked_for(tmp_path, changes, message):
    sections = {"space": {"model.window": [8, 16]}, **changes}
    with pytest.raises(ConfigError, match=message):
        sweep.run(recipe_from_dict({"run": {"folder": str(tmp_path)}, "sweep": sections}))
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_point_of_a_grid_is_skipped_with_its_reason(base, capsys):
    recipe = with_overrides(
        base,
        {"sweep.name": "skips", "sweep.space": {"model.index_topk": [2, 24]}, "sweep.evaluate_front": True,
         "evaluate": {"tasks": ["mqar"], "lengths": [96, 128], "samples": 1}},
    )  # fmt: skip
    result = sweep.run(recipe)
    report = json.loads((recipe.sweep_folder / "sweep.json").read_text())["result"]
    assert list(report["by_length"]) == ["mqar at 96 tokens", "mqar at 128 tokens"]
    assert all(list(scores) == [result.winner.run_id] for scores in report["by_length"].values())
    assert [point["settings"] for point in report["points"]] == [{"model.index_topk": 2}]
    assert "skips: skipped model.index_topk=24: model.index_topk: 24 is not below" in capsys.readouterr().out
