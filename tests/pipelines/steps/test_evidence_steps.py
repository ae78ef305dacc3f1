"""The ablate, compare and report steps on a Ray cluster and a tracking store."""

import json
import re

import pytest

from model.errors import ConfigError
from pipelines.experiments.outputs import RESULTS
from pipelines.experiments.trials import RESULT
from pipelines.recipe.loading import with_overrides
from pipelines.steps import ablate, compare, report, sweep
from pipelines.tracking.mlflow_store import open_tracking

GQA = {"hidden_size": 32, "layers": ["gqa", "gqa", "gqa"], "num_heads": 2, "head_dim": 16, "rope_head_dim": 8,
       "num_experts": 4, "experts_per_token": 2, "expert_size": 16, "max_positions": 256, "num_kv_heads": 1,
       "hyper_connections": False, "qat": False}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(prepared, ray_cluster):
    return with_overrides(
        prepared,
        {
            "tracking.experiment": "evidence",
            "tracking.system_metrics_interval": None,
            "model.index_topk": 2,
            "train.stages": [{"attention": "dense", "steps": 2}, {"attention": "sparse", "steps": 2}],
            "train.validate_every": 2,
            "ablate": {"choices": ["hyper_connections", "qat"], "seeds": [0, 1, 2], "rates": [1.0], "context": 256},
            "compare": {"arms": {"gqa": GQA}, "seeds": [0, 1], "max_concurrent": 1, "rates": [1.0, 2.0],
                        "further_rates": 1, "parameter_tolerance": 0.5, "timed_lengths": [64, 128],
                        "timed_prefill": 64, "max_measured_bytes": 1 << 18},
            "evaluate": {"tasks": ["mqar"], "lengths": [96], "samples": 1},
            "sweep": {"name": "evidence-sweep", "max_concurrent": 1, "space": {"model.index_topk": [1, 2]},
                      "overrides": {"train.stages": [{"attention": "sparse", "steps": 2}]}},
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def ablated(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return ablate.run(recipe, write=folder), folder


def runs_of_kind(recipe, kind):
    tracking = open_tracking(recipe)
    return tracking.client.search_runs([tracking.experiment_id], f"tags.kind = '{kind}'")


def test_an_ablation_trains_every_arm_with_every_seed_in_nested_runs(recipe, ablated):
    result, folder = ablated
    assert [arm.name for arm in result.arms] == ["full", "hyper_connections", "qat"]
    (parent,) = runs_of_kind(recipe, "ablate")
    nested = {run.info.run_id: run for run in runs_of_kind(recipe, "ablate_trial")}
    assert parent.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in nested.values()} == {parent.info.run_id}
    for arm in result.arms:
        seeds = [nested[run_id].data.tags["seed"] for run_id in arm.equal_tokens.run_ids]
        assert seeds == ["0", "1", "2"]
        assert len(set(arm.equal_tokens.metrics["validation/loss"])) == 3
    assert {path.name for path in folder.iterdir()} == {"ablate.json", "waterfall.png"}


def test_measured_costs_equal_the_closed_forms(ablated):
    for stage in ablated[0].waterfall:
        assert stage.counted_flops == pytest.approx(stage.flops, rel=0.05), stage.name
        assert stage.measured_bytes == pytest.approx(stage.cache_bytes, rel=0.5), stage.name  # whole pages
    none, hybrid = ablated[0].waterfall[:2]
    assert none.cache_bytes > 2 * hybrid.cache_bytes


def test_an_arm_with_cheaper_steps_gets_more_of_them_for_equal_flops(ablated):
    full, plain, qat = ablated[0].arms
    assert plain.equal_flops is not None and qat.equal_flops is None
    assert plain.equal_flops.steps > plain.equal_tokens.steps
    assert plain.equal_flops.flops == pytest.approx(full.equal_tokens.flops, rel=0.1)


def test_quantization_is_scored_in_four_ways(ablated):
    exact, after, with_qat, bf16_keys = ablated[0].quantization.values()
    assert all(len(values) == 3 for scores in ablated[0].quantization.values() for values in scores.values())
    assert exact["loss"] != after["loss"] and with_qat["recall_at_k"] != bf16_keys["recall_at_k"]
    full, _, qat = ablated[0].arms
    assert with_qat["loss"] == pytest.approx(full.equal_tokens.metrics["validation/loss"])
    assert after["loss"] == pytest.approx(qat.equal_tokens.metrics["validation/loss"])


def test_finished_trials_are_reused_and_a_lost_one_is_trained_again(recipe, ablated, capsys):
    result, _ = ablated
    # Other tests may have trained trials in the same folder.
    own = {run.info.run_id for run in runs_of_kind(recipe, "ablate_trial")}
    trials = sorted((recipe.experiments_folder / "trials").glob(f"*/{RESULT}"))
    trials = [path for path in trials if json.loads(path.read_text())["run_id"] in own]
    before = {path: path.stat().st_mtime_ns for path in trials}
    lost = trials[0]
    lost.unlink()
    capsys.readouterr()
    again = ablate.run(recipe)
    after = {path: path.stat().st_mtime_ns for path in trials}
    assert {path for path in trials if before[path] != after[path]} == {lost}
    assert again.arms == result.arms
    first, second = sorted(runs_of_kind(recipe, "ablate"), key=lambda run: run.info.start_time)
    assert first.info.status == second.info.status == "FINISHED"  # a finished run stays as it is
    assert "finished trials are reused" in capsys.readouterr().out


@pytest.fixture(scope="module")
def compared(recipe):
    return compare.run(recipe)


def test_a_comparison_scores_tasks_and_measures_costs(recipe, compared):
    hybrid, gqa = compared.arms
    assert (hybrid.name, gqa.name) == ("hybrid", "gqa")
    for arm in (hybrid, gqa):
        assert len(arm.runs.metrics["eval/mqar/96/recall"]) == 2
        assert set(arm.rate_losses) in ({"0.5", "1", "2"}, {"1", "2", "4"}), "one of two rates is at an edge"
        assert arm.rate_losses[f"{arm.rate:g}"] == min(arm.rate_losses.values())
        assert all(seconds > 0 for seconds in arm.decode_seconds)
        assert arm.prefill_seconds[0] > 0 and arm.prefill_seconds[1] is None
        measured = [size for size in arm.costs.measured_bytes if size is not None]
        assert measured and len(measured) < len(arm.costs.measured_bytes)  # the longest are too large here
        for closed, size in zip(arm.costs.cache_bytes, arm.costs.measured_bytes):
            assert size is None or size == pytest.approx(closed, rel=0.1)
    assert compared.ssa.measured_bytes == [None] * 6 and compared.ssa.cache_bytes == gqa.costs.cache_bytes
    assert all(assumed < dense for assumed, dense in zip(compared.ssa.flops, gqa.costs.flops))
    v32, pro, flash = compared.published
    assert v32.bytes_per_token == 48_068
    assert flash.cache_bytes / v32.cache_bytes == pytest.approx(0.07, abs=0.005)
    assert pro.equivalent / v32.equivalent == pytest.approx(0.27, abs=0.01)


def test_a_report_shows_all_figures_and_their_runs(recipe, ablated, compared, tmp_path):
    with pytest.raises(ConfigError, match=r"no finished run of sweep named 'evidence-sweep' \(sweep\.name\); run"):
        report.run(recipe)
    swept = sweep.run(recipe)
    path = report.run(recipe)
    text = path.read_text()
    markup = re.sub(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"', "", text)  # any four letters occur in pixels
    assert markup.count("src=") == markup.count("href=") == markup.count("http") == 0
    figures = {"waterfall", "pareto", "families-costs", "families-lengths", "families-quality"}
    assert set(re.findall(r'alt="([^"]*)"', text)) == figures
    assert {each.stem for each in path.parent.glob("*.png")} == figures
    ablation, comparison = (runs_of_kind(recipe, step)[0] for step in ("ablate", "compare"))  # the newest
    for run_id in (ablation.info.run_id, comparison.info.run_id, swept.run_id):
        assert f"<code>{run_id}</code>" in text
    assert "no intervals and no tests: they need at least 3 seeds, this run has 2 seeds" in text
    (logged,) = runs_of_kind(recipe, "report")
    artifacts = {each.path for each in open_tracking(recipe).client.list_artifacts(logged.info.run_id)}
    assert artifacts >= {"report.html", *(f"{name}.png" for name in figures)}
    assert sorted((recipe.experiments_folder / "trials").glob(f"*/{RESULT}"))  # not needed by the report
    own = ablation.info.run_id
    with pytest.raises(ConfigError, match=rf"report\.sweep: expected a run of sweep, but {own} is one of ablate"):
        report.run(with_overrides(recipe, {"report.sweep": own}))
    with pytest.raises(ConfigError, match=r"report\.sweep: expected the id of an MLflow run in \S+, found 'nope'"):
        report.run(with_overrides(recipe, {"report.sweep": "nope"}))
    with pytest.raises(ConfigError, match=r"no finished run of ablate named 'ablation-quick' \(ablate\.name\)"):
        report.run(with_overrides(recipe, {"ablate.name": "ablation-quick"}))
    old = open_tracking(recipe).start_run("old", kind="ablate", recipe=recipe)
    with old:
        old.log_dict({"step": "ablate", "run_id": old.run_id, "result": {"name": "of another version"}}, RESULTS)
    with pytest.raises(ConfigError, match=rf"run {old.run_id} has no results\.json that can be read"):
        report.run(with_overrides(recipe, {"report.ablate": old.run_id}))


def test_points_without_a_score_at_a_length_do_not_end_a_sweep(recipe, capsys):
    changes = {"sweep.name": "front", "sweep.evaluate_front": True, "evaluate.lengths": [96, 200_000]}
    sweep.run(with_overrides(recipe, changes))
    said = capsys.readouterr().out
    assert re.search(r"front: .*: no score: .*evaluate\.lengths: 200000 exceeds the model's context", said)
    assert re.search(r"\bmqar at 96 tokens\W+\d\.\d{3}\b", said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate.lengths": [512]}, r"compare: arm hybrid: .*512 exceeds the model's context"),
        ({"evaluate.tasks": ["nothing"]}, r"compare: arm hybrid: evaluate\.tasks: 'nothing' is not one of"),
        ({"compare.arms": {"gqa": {**GQA, "max_positions": 64}}}, r"compare: arm gqa: .*96.* exceeds"),
    ],
)
def test_a_comparison_that_cannot_be_scored_is_refused_before_any_trial(recipe, changes, message):
    recipe = with_overrides(recipe, {**changes, "compare.name": "refused-comparison"})
    with pytest.raises(ConfigError, match=message):
        compare.run(recipe)
    assert not (recipe.experiments_folder / "refused-comparison/tune").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ablate.context": 512}, r"ablate\.context: 512 exceeds model\.max_positions 256"),
        ({"model.qat": False}, "the recipe does not use qat"),
        ({"ablate.variants": {"wide": {"model.window": 64}}, "ablate.choices": []},
         r"ablate: arm wide: model\.window: 64 is wider than the 8 tokens"),
    ],
)  # fmt: skip
def test_an_ablation_that_cannot_be_trained_is_refused_before_any_trial(recipe, changes, message):
    recipe = with_overrides(recipe, {**changes, "ablate.name": "refused"})
    with pytest.raises(ConfigError, match=message):
        ablate.run(recipe)
    assert not (recipe.experiments_folder / "refused").exists()
