"""The train and sweep steps on a real Ray cluster and a real tracking store."""

import fcntl
import json
import re

import pytest
import torch

from model import checkpoint
from model.errors import CheckpointError, ConfigError, FiftyfoldError
from pipelines.data.check import check_prepared
from pipelines.data.manifest import read_manifest
from pipelines.ray_runtime.checkpoint_index import INDEX
from pipelines.ray_runtime.fit import RAY_RUN
from pipelines.recipe.loading import overlay, recipe_from_dict, with_overrides
from pipelines.reports.cache_measurement import BYTES_PER_TOKEN
from pipelines.reports.pareto import Point, SweepReport
from pipelines.steps import evaluate, promote, sweep, train
from pipelines.steps.sweep import choose_winner
from pipelines.tracking.mlflow_store import open_tracking
from pipelines.tracking.registry import download
from pipelines.tracking.run_folder import LOCK_FILE
from pipelines.training import compute_dtype
from pipelines.training.curriculum import total_steps


@pytest.fixture(scope="module")
def trained(prepared, ray_cluster):
    changes = {"run.name": "trained", "train.workers": 2, "train.sharding": "fsdp", "train.keep_checkpoints": 1,
               "train.autocast": "auto", "train.optimizer.ns_dtype": "auto"}  # fmt: skip
    recipe = with_overrides(prepared, changes)
    return recipe, train.run(recipe)


def test_a_run_leaves_a_checkpoint_and_its_record(trained):
    recipe, result = trained
    model = checkpoint.load(result.checkpoint)
    assert model.config == recipe.model.replace(vocab_size=258)
    assert not [p for p in recipe.run_folder.iterdir() if p.name.startswith(".")]
    (sharded,) = (recipe.run_folder / "train").glob("step_000006")
    assert {p.name for p in sharded.glob("model-*")} == {f"model-rank-0000{n}-of-00002.safetensors" for n in (1, 2)}
    for name, tensor in checkpoint.load(sharded).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    run = open_tracking(recipe).client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["checkpoint"] == str(recipe.final_checkpoint)
    assert run.data.params["model.index_topk"] == "4"
    dtypes = compute_dtype.choose("cpu")
    assert dtypes.items() <= run.data.tags.items() and run.data.params["train.autocast"] == "auto"
    assert compute_dtype.read(sharded) == compute_dtype.read(result.checkpoint) == dtypes
    for name in (
        "train/loss", "train/indexer_kl", "train/grad_norm", "train/step_seconds", "train/learning_rate/muon",
        "train/learning_rate/adamw", "validation/loss", "validation/recall", "validation/recall_at_k",
        "cache/bytes_per_token", "optimizer/muon_share",
    ):  # fmt: skip
        assert name in run.data.metrics, name
    history = open_tracking(recipe).client.get_metric_history(result.run_id, "train/loss")
    assert [m.step for m in history] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_not_trained_again(trained):
    recipe, result = trained
    before = (result.checkpoint / "model.safetensors").read_bytes()
    again = train.run(recipe)
    assert again.run_id == result.run_id
    assert (again.checkpoint / "model.safetensors").read_bytes() == before
    history = open_tracking(recipe).client.get_metric_history(result.run_id, "train/loss")
    assert len(history) == total_steps(recipe)


def test_a_run_goes_on_with_its_own_data_only(trained):
    recipe, _ = trained
    manifest = recipe.data_folder / "manifest.json"
    content = manifest.read_text()
    manifest.write_text(content + "\n")
    try:
        with pytest.raises(ConfigError, match=r"'trained' was started with another data\.manifest"):
            train.run(recipe)
    finally:
        manifest.write_text(content)


@pytest.mark.parametrize(("setting", "value"), [("model.window", 6), ("run.seed", 1)])
def test_a_changed_recipe_needs_a_name_of_its_own(trained, setting, value):
    recipe, _ = trained
    with pytest.raises(ConfigError, match=f"'trained' was started with another {re.escape(setting)}"):
        train.run(with_overrides(recipe, {setting: value}))


def test_only_a_run_that_has_not_begun_needs_its_first_weights(prepared, ray_cluster, tmp_path, monkeypatch):
    recipe = with_overrides(prepared, {"run.name": "tuned", "train.init_from": str(tmp_path / "first")})
    with pytest.raises(CheckpointError, match="first"):
        train.run(recipe)
    assert not recipe.run_folder.exists()  # the name stays free for a corrected recipe
    (recipe.run_folder / RAY_RUN).mkdir(parents=True)
    (recipe.run_folder / RAY_RUN / INDEX).touch()

    def begin(*_):
        raise InterruptedError

    monkeypatch.setattr(train, "fit", begin)
    with pytest.raises(InterruptedError):
        train.run(recipe)


def test_a_run_is_one_process_s_at_a_time(trained):
    recipe, _ = trained
    with (recipe.run_folder / LOCK_FILE).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"run\.name: another process works on 'trained'"):
            train.run(recipe)
    train.run(recipe)


@pytest.fixture(scope="module")
def swept(trained):
    recipe, result = trained
    recipe = with_overrides(
        recipe,
        {
            "sweep": {
                "name": "ratios",
                "space": {"model.csa_ratio": [2, 4, 8]},
                "overrides": {"train.workers": 1, "train.sharding": "none",
                              "train.stages": [{"attention": "sparse", "steps": 4}], "train.validate_every": 2},
                "max_cache_bytes_per_token": 35.0,
            },
            "train.init_from": str(result.checkpoint),
        },
    )  # fmt: skip
    return recipe, sweep.run(recipe)


def points_of(recipe):
    """Return the trials among the results of a sweep."""
    return SweepReport.from_dict(json.loads((recipe.sweep_folder / "sweep.json").read_text())["result"]).points


def test_a_sweep_nests_its_trials_and_keeps_the_best_within_the_budget(swept):
    recipe, result = swept
    client = open_tracking(recipe).client
    experiment = client.get_run(result.run_id).info.experiment_id
    nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{result.run_id}'")
    points = points_of(recipe)
    assert len(nested) == 3 == len(points)
    assert {run.info.status for run in nested} == {"FINISHED"}
    fitting = [point for point in points if point.cost <= 35.0]
    assert len(fitting) == 2
    assert result.winner.metrics["validation/loss"] == min(point.metrics["validation/loss"] for point in fitting)
    assert {a.path for a in client.list_artifacts(result.run_id)} >= {"pareto.png", "trials.json", "winner.yaml"}
    config = checkpoint.load_config(result.checkpoint)
    assert config.csa_ratio == result.winner.settings["model.csa_ratio"]
    assert overlay(recipe, recipe.sweep_folder / "winner.yaml").model.csa_ratio == config.csa_ratio


def test_a_finished_sweep_resumes_to_the_same_winner(swept):
    recipe, result = swept
    first, aside = recipe.train.init_from, recipe.train.init_from.with_name("aside")
    first.rename(aside)  # no trial is left that needs it
    try:
        again = sweep.run(recipe)
    finally:
        aside.rename(first)
    assert again.run_id == result.run_id
    assert again.winner == result.winner


def test_other_settings_do_not_go_on_from_the_winner(swept):
    recipe, _ = swept
    with pytest.raises(ConfigError, match="'ratios-winner' was started with another"):
        train.run(with_overrides(recipe, {"run.name": "ratios-winner"}))


def test_scores_promote_the_winner(swept):
    recipe, result = swept
    evaluate.run(with_overrides(recipe, {"evaluate.checkpoint": str(result.checkpoint)}))
    promoted = promote.run(recipe)
    assert promoted.winner.checkpoint == result.checkpoint
    folder = download(open_tracking(recipe), "models:/fiftyfold@champion", recipe.run.folder / "unused", "key")
    assert checkpoint.load_config(folder) == checkpoint.load_config(result.checkpoint)


def test_a_trial_may_have_train_workers_of_its_own(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # trials run in other folders, and must find this store
    recipe = with_overrides(trained[0], {"tracking.uri": "sqlite:///other.db"})
    recipe = with_overrides(
        recipe,
        {
            "sweep": {
                "name": "workers",
                "space": {"model.index_topk": [2], "model.qat": [False], "train.grad_clip": [0.5]},
                "in_process": False,
                "max_concurrent": 1,
                "overrides": {"train.workers": 1, "train.sharding": "none",
                              "train.stages": [{"attention": "sparse", "steps": 2}], "train.validate_every": 1},
            }
        },
    )  # fmt: skip
    # As if the sweep had begun on another kind of machine.
    here = compute_dtype.choose("cpu")
    there = compute_dtype.FLOAT32 if here == compute_dtype.BF16 else compute_dtype.BF16
    recipe.sweep_folder.mkdir(parents=True)
    compute_dtype.write(recipe.sweep_folder, there)
    result = sweep.run(recipe)
    assert len(points_of(recipe)) == 1 and (tmp_path / "other.db").exists()
    run = open_tracking(recipe).client.get_run(result.winner.run_id)
    assert run.info.status == "FINISHED" and there.items() <= run.data.params.items()
    assert compute_dtype.read(result.checkpoint) == there
    model = checkpoint.load(result.checkpoint)
    assert (model.config.index_topk, model.config.qat) == (2, False)
    assert overlay(recipe, recipe.sweep_folder / "winner.yaml").train.grad_clip == 0.5


def test_settings_that_the_data_or_the_cluster_cannot_serve_are_refused(prepared, ray_cluster):
    manifest = read_manifest(prepared.data_folder)
    with pytest.raises(ConfigError, match=r"model\.window: 9 is wider than the 8 tokens"):
        train.run(with_overrides(prepared, {"run.name": "wide", "model.window": 9}))
    for key, there, here in (
        ("packing", True, False), ("pairs", 3, 4), ("sequence_length", 96, 64), ("seed", 1234, 5), ("sources", "", []),
    ):  # fmt: skip
        message = rf"data\.{key}: {re.escape(json.dumps(here))}, but .* was prepared with {json.dumps(there)[:4]}"
        with pytest.raises(ConfigError, match=message.replace('with ""', "with ")):
            check_prepared(with_overrides(prepared, {f"data.{key}": here}), manifest)
    with pytest.raises(ConfigError, match=r"train\.workers: needs 9 CPUs, the Ray cluster has 6"):
        train.run(with_overrides(prepared, {"run.name": "many", "train.workers": 8}))


def test_a_tie_goes_to_the_smaller_cache_and_nan_never_wins():
    recipe = recipe_from_dict({"sweep": {"metric": "validation/loss", "max_cache_bytes_per_token": 50}})
    trials = [
        Point("", {"n": i}, {"validation/loss": loss, BYTES_PER_TOKEN: cache}, str(i), 1)
        for i, (loss, cache) in enumerate([(float("nan"), 1), (2.0, 40), (2.0, 30), (1.0, 60), (3.0, 10)])
    ]
    assert choose_winner(trials, recipe) is trials[2]
    with pytest.raises(ConfigError, match="no trial fits 50 bytes; the smallest takes 60"):
        choose_winner([trials[3]], recipe)
    with pytest.raises(ConfigError, match="trials report no 'validation/loss'"):
        choose_winner([Point("", {}, {BYTES_PER_TOKEN: 1.0}, "x", 1)], recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep.space": {}}, "sweep.space: is empty"),
        ({"sweep.space": {"model.index_topk": []}}, r"sweep\.space\.model\.index_topk: must not be empty"),
        (
            {"sweep.space": {"model.index_topk": [24, 30]}},
            r"holds no valid point \(.*24 is not below the 24 entries.*30 is",
        ),
        ({"sweep.space": {"model.topk": [2]}}, "model.topk: unknown key"),
        (
            {"sweep.space": {"model.index_topk": [2]}, "train.stages": [{"steps": 2, "index_topk": 3}]},
            r"'model\.index_topk' changes nothing, because train\.stages\.0 sets index_topk itself",
        ),
        (
            {"sweep.space": {"model.index_topk": [2]}, "train.workers": 2},
            r"sweep\.in_process: trials .* but train\.workers is 2",
        ),
        ({"sweep.space": {"model.qat": [1.5]}}, r"holds no valid point \(model\.qat: .*1\.5"),
        ({"sweep.space": {"model.index_topk": [2, 2]}}, r"sweep\.space\.model\.index_topk: has the value 2 twice"),
        (
            {"sweep.space": {"model.csa_ratio": [2, 4]}, "sweep.max_cache_bytes_per_token": 5},
            r"sweep\.max_cache_bytes_per_token: no point of sweep\.space fits 5 bytes; the smallest takes \d+",
        ),
        (
            {
                "sweep.space": {"model.csa_ratio": {"int": [2, 6]}},
                "sweep.trials": 2,
                "sweep.max_cache_bytes_per_token": 5,
            },
            r"sweep\.max_cache_bytes_per_token: no point of sweep\.space fits 5 bytes",
        ),
        ({"sweep.space": {"model.csa_ratio": {"int": [2, 6]}}}, r"sweep\.trials: is not set, but 'model\.csa_ratio'"),
        ({"sweep.space": {"model.index_topk": {"int": [30, 40]}}, "sweep.trials": 2}, "holds no valid point"),
        ({"sweep.space": {"run.name": ["a", "b"]}}, "'run.name' changes nothing in a trial"),
        ({"sweep.space": {"model.mixer_options.gqa.conv_kernel": [2, 4]}}, "changes nothing, because model.layers has"),
        ({"sweep.space": {"train.checkpoint_every": [2, 3]}}, "'train.checkpoint_every' changes nothing"),
        ({"sweep.space": {"train.stages.0.steps": [2, 3]}}, "'train.stages.0.steps' names an item of a list"),
        (
            {"sweep.space": {"model.qat": [None]}},
            "model.qat.0: expected a number, text, true or false, or a list of names, found null",
        ),
        (
            {"sweep.space": {"model.index_topk": [2]}, "sweep.metric": "validation/los"},
            r"sweep\.metric: expected one of validation/loss, .*, found 'validation/los'",
        ),
    ],
)
def test_a_bad_space_is_refused_before_any_trial(prepared, changes, message):
    with pytest.raises(ConfigError, match=message):
        sweep.run(with_overrides(prepared, changes))
    assert not prepared.sweep_folder.exists()


def test_a_space_without_a_point_that_can_begin_is_refused(trained):
    recipe, result = trained
    recipe = with_overrides(
        recipe, {"train.init_from": str(result.checkpoint), "sweep.space": {"model.hyper_connections": [False]},
                 "sweep.name": "odd", "sweep.overrides": {"train.workers": 1, "train.sharding": "none"}},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"no valid point \(train\.init_from: .*'hyper_head\.base' is not part of"):
        sweep.run(recipe)
    assert not recipe.sweep_folder.exists()


@pytest.mark.long
def test_a_deterministic_failure_is_not_retried(prepared, ray_cluster):
    """The learning rate makes the loss spike. The restarted worker must not train."""
    recipe = with_overrides(
        prepared,
        {"run.name": "spikes", "train.stages": [{"attention": "dense", "steps": 30}], "train.validate_every": 100,
         "train.checkpoint_every": 100, "train.stability": {"action": "stop", "spike": 1e-3, "window": 4},
         "train.max_failures": 1, "train.optimizer.learning_rate": 1.0},
    )  # fmt: skip
    with pytest.raises(FiftyfoldError, match=r"step \d+: the loss spiked .*, and train\.stability\.action is stop"):
        train.run(recipe)
    run_id = json.loads((recipe.run_folder / "run.json").read_text())["run_id"]
    steps = [p.step for p in open_tracking(recipe).client.get_metric_history(run_id, "train/loss")]
    assert steps and len(steps) == len(set(steps))


def test_run_file_is_json(trained):
    recipe, result = trained
    assert json.loads((recipe.run_folder / "run.json").read_text())["run_id"] == result.run_id


def test_a_run_killed_after_its_last_step_only_finishes(trained):
    recipe, result = trained
    tracking = open_tracking(recipe)
    before = (result.checkpoint / "model.safetensors").read_bytes()
    tracking.client.set_terminated(result.run_id, "KILLED")
    again = train.run(recipe)
    assert (again.checkpoint / "model.safetensors").read_bytes() == before
    assert again.metrics["validation/loss"] == pytest.approx(result.metrics["validation/loss"])
    # The only checkpoint is still there to resume from.
    assert (recipe.run_folder / "train" / "step_000006" / "trainer.json").is_file()
    assert tracking.client.get_run(result.run_id).info.status == "FINISHED"
