"""The evaluate and promote steps: only an intact checkpoint within the budget is promoted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils import validation

from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.tokenizer import ByteTokenizer, load_tokenizer
from model.transformer import Transformer
from pipelines.recipe.loading import load_recipe, recipe_from_dict, with_overrides
from pipelines.recipe.schema import Recipe
from pipelines.steps import evaluate, promote
from pipelines.tracking.mlflow_store import open_tracking
from pipelines.tracking.registry import WEIGHTS_TAG, download, weights_digest

MODEL = ModelConfig(hidden_size=32, layers=("sliding", "csa", "hca"), max_positions=512)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A database for all tests of this file, with an experiment and a registered model per test."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def recipe(store, request) -> Recipe:
    name = request.node.name.split("[")[0].replace("test_", "")
    return recipe_from_dict(
        {
            "run": {"folder": str(store), "name": name},
            "evaluate": {"lengths": [128, 256], "depths": [0.1, 0.9], "samples": 3},
            "promote": {"registered_name": name},
            "tracking": {"experiment": name},
        }
    )


def named(recipe: Recipe, name: str) -> Recipe:
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": f"{recipe.run.name}-{name}"})})


def with_budget(recipe: Recipe, budget: float, **more) -> Recipe:
    update = {"max_cache_bytes_per_token": budget, **more}
    return recipe.model_copy(update={"promote": recipe.promote.model_copy(update=update)})


def train(
    recipe: Recipe,
    name: str,
    score: float | None,
    cache: float | None,
    seed: int = 0,
    kind: str = "train",
    kept: bool = True,
):
    """Write the results of a training: a finished run, run.json and the final checkpoint."""
    mine = named(recipe, name)
    tracking = open_tracking(mine)
    with tracking.start_run(name, kind=kind, recipe=mine) as run:
        torch.manual_seed(seed)
        checkpoints.save(Transformer(MODEL), mine.final_checkpoint, ByteTokenizer())
        content = {"run_id": run.run_id, "tracking_uri": tracking.uri}
        (mine.run_folder / "run.json").write_text(json.dumps(content))
        if kept:
            run.set_tags({"checkpoint": str(mine.final_checkpoint)})
        if score is not None:
            run.log_metrics({"eval/recall": score})
            run.set_tags({WEIGHTS_TAG: weights_digest(mine.final_checkpoint)})
        if cache is not None:
            run.log_metrics({"cache/bytes_per_token": cache}, step=100)
    return run


def fetch(recipe: Recipe, uri: str) -> Path:
    return download(open_tracking(recipe), uri, recipe.run.folder / "unused", "serve.model_uri")


def versions(recipe: Recipe) -> list[str]:
    client = open_tracking(recipe).client
    return sorted(str(v.version) for v in client.search_model_versions(f"name = '{recipe.promote.registered_name}'"))


def champion(recipe: Recipe):
    return open_tracking(recipe).client.get_model_version_by_alias(recipe.promote.registered_name, "champion")


def test_the_best_within_the_budget_wins(recipe, capsys):
    train(recipe, "weak", 0.4, 100, seed=1)
    winner = train(recipe, "good", 0.9, 200, seed=2)
    train(recipe, "large", 0.99, 400, seed=3)
    train(recipe, "unscored", None, 100)
    train(recipe, "trial", 1.0, 10, kind="trial", kept=False)  # a sweep keeps only its winner's checkpoint

    result = promote.run(with_budget(recipe, 300))
    assert result.winner.run_id == winner.run_id
    assert (result.version, versions(recipe)) == ("1", ["1"])
    lines = capsys.readouterr().out
    assert sorted(re.sub(r" \(\w+\)", "", line) for line in lines.splitlines() if line.startswith("refused")) == [
        "refused large: its cache takes 400 bytes per token, the budget is 300",
        "refused unscored: has no metric eval/recall, run the evaluate step",
    ]
    printed = " ".join(lines.split())
    assert f"models:/{recipe.promote.registered_name}@champion is now version 1: run good" in printed
    assert (
        "0.9, of 2 eligible runs (next: weak, 0.4), with 200 cache bytes per token within the budget of 300" in printed
    )

    version = champion(recipe)
    assert version.run_id == winner.run_id
    assert version.tags == {"eval/recall": "0.9", "cache/bytes_per_token": "200"}
    tracking = open_tracking(recipe)
    (logged,) = tracking.client.search_logged_models([tracking.experiment_id])
    assert logged.source_run_id == winner.run_id
    assert str(logged.status) == "READY"
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": version.name, "version": "1"}]
    assert logged.params["layers"] == "['sliding', 'csa', 'hca']"
    assert {metric.key: metric.value for metric in logged.metrics} == {"eval/recall": 0.9, "cache/bytes_per_token": 200}


def test_what_was_registered_is_the_checkpoint_itself(recipe):
    train(recipe, "only", 0.5, 100, seed=5)
    result = promote.run(recipe)
    source = result.winner.checkpoint
    for uri in (result.model_uri, f"models:/{recipe.promote.registered_name}/1"):
        folder = fetch(recipe, uri)
        assert folder != source
        assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
        for path in source.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(source)  # the registered copy is independent
    assert checkpoints.load(folder).config == MODEL
    assert load_tokenizer(folder).vocab_size == 258


def test_promoting_again_makes_a_version_and_moves_the_alias(recipe):
    first = train(recipe, "first", 0.5, 100, seed=1)
    promote.run(recipe)
    assert champion(recipe).run_id == first.run_id
    second = train(recipe, "second", 0.7, 100, seed=2)
    result = promote.run(recipe)
    assert result.version == "2"
    assert champion(recipe).run_id == second.run_id
    assert versions(recipe) == ["1", "2"]
    old = fetch(recipe, f"models:/{recipe.promote.registered_name}/1")
    new = fetch(recipe, result.model_uri)
    assert (old / "model.safetensors").read_bytes() != (new / "model.safetensors").read_bytes()


def test_ties_go_to_the_smaller_cache_and_min_turns_the_order(recipe):
    train(recipe, "large", 0.5, 300)
    train(recipe, "small", 0.5, 100)
    train(recipe, "worst", 0.2, 200)
    assert promote.run(recipe).winner.name == "small"
    assert promote.run(with_budget(recipe, 1000, mode="min")).winner.name == "worst"


def test_a_refused_promotion_creates_no_tracking_store(tmp_path):
    recipe = recipe_from_dict({"run": {"folder": str(tmp_path / "new")}})
    with pytest.raises(ConfigError, match=r"new/mlflow\.db: no such tracking store; run the train step first"):
        promote.run(recipe)
    assert list(tmp_path.iterdir()) == []


def test_nobody_eligible_lists_every_reason(recipe):
    message = r"no run of experiment 'nobody_eligible.*' .* is eligible for promote\.metric 'eval/recall'.*: none was"
    with pytest.raises(ConfigError, match=message):
        promote.run(recipe)
    train(recipe, "large", 0.9, 400)
    train(recipe, "unmeasured", 0.9, None)
    tracking = open_tracking(recipe)
    tracking.start_run("running", kind="train", recipe=recipe)
    with pytest.raises(RuntimeError), tracking.start_run("failed", kind="train", recipe=recipe):
        raise RuntimeError
    with tracking.start_run("bare", kind="train", recipe=recipe) as bare:
        bare.log_metrics({"eval/recall": 0.9, "cache/bytes_per_token": 1})
    shutil.rmtree(named(recipe, "gone").run_folder, ignore_errors=True)
    train(recipe, "gone", 0.9, 100)
    shutil.rmtree(named(recipe, "gone").final_checkpoint)
    train(recipe, "again", 0.9, 100)
    later = train(recipe, "again", None, 100)  # replaces the scored files

    with pytest.raises(ConfigError) as caught:
        promote.run(with_budget(recipe, 300))
    message = str(caught.value)
    for reason in (
        "its cache takes 400 bytes per token, the budget is 300",
        "has no metric cache/bytes_per_token to compare with the budget",
        "its status is RUNNING",
        "its status is FAILED",
        "names no checkpoint",
        f"its checkpoint {named(recipe, 'gone').final_checkpoint} is gone",
        f"now belongs to run {later.run_id}",
        "has no metric eval/recall, run the evaluate step",
    ):
        assert reason in message
    assert "\n" not in message
    assert versions(recipe) == []


@pytest.mark.parametrize("damage", ["cut", "missing", "other model"])
def test_damaged_checkpoint_leaves_the_registry_unchanged(recipe, damage):
    first = train(recipe, f"sound-{damage[:3]}", 0.5, 100)
    promote.run(recipe)
    before = versions(recipe)
    train(recipe, f"damaged-{damage[:3]}", 0.9, 100)
    weights = named(recipe, f"damaged-{damage[:3]}").final_checkpoint / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "missing":
        weights.unlink()
    else:
        checkpoints.save(Transformer(MODEL.replace(hidden_size=64)), weights.parent.with_name("other"))
        shutil.copy(weights.parent.with_name("other") / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        promote.run(recipe)
    assert versions(recipe) == before
    assert champion(recipe).run_id == first.run_id
    tracking = open_tracking(recipe)
    assert len(tracking.client.search_logged_models([tracking.experiment_id])) == len(before)
    shutil.rmtree(weights.parent)  # the next damage starts from an intact best run


def test_weights_that_were_not_evaluated_are_not_promoted(recipe):
    train(recipe, "weak", 0.4, 100)
    train(recipe, "longer", 0.9, 100)
    torch.manual_seed(1)  # trained further in the same run after its evaluation
    checkpoints.save(Transformer(MODEL), named(recipe, "longer").final_checkpoint, ByteTokenizer())
    with pytest.raises(
        CheckpointError, match=r"of run longer .* was measured on other weights than .* evaluate it again"
    ):
        promote.run(recipe)
    assert versions(recipe) == []
    evaluate.run(named(recipe, "longer"))
    tracking = open_tracking(recipe)
    # Its low score now belongs to its weights, and the weak run is the best.
    assert promote.run(recipe).winner.name == "weak"
    assert promote.run(with_budget(recipe, 1000, mode="min")).winner.name == "longer"
    assert len(tracking.client.search_logged_models([tracking.experiment_id])) == 2


def test_interrupted_copy_registers_nothing(recipe, store):
    train(recipe, "only", 0.5, 100)
    tracking = open_tracking(recipe)
    checkpoint = named(recipe, "only").final_checkpoint
    (checkpoint / "link-to-nothing").symlink_to(checkpoint / "nothing")  # loads, but cannot be copied
    with pytest.raises(CheckpointError, match="could not register"):
        promote.run(recipe)
    assert versions(recipe) == []
    assert not tracking.client.search_logged_models([tracking.experiment_id])
    logged = (store / "mlartifacts" / "models").glob("*/artifacts/*")
    assert {path.name for path in logged} <= {"model.safetensors", "config.json", "tokenizer.json"}


@pytest.mark.parametrize("call", ["create_model_version", "set_logged_model_tags", "set_registered_model_alias"])
def test_a_failed_registration_leaves_the_registry_unchanged(recipe, store, monkeypatch, call):
    recipe = with_overrides(recipe, {"promote.registered_name": f"failing.{call}", "tracking.experiment": call})
    train(recipe, "only", 0.5, 100)

    def fail(*_, **__):
        raise MlflowException("the server is gone")

    tracking = open_tracking(recipe)
    for registered in (False, True):  # as a new model, and as one more version
        if registered:
            promote.run(recipe)
        before = versions(recipe), len(tracking.client.search_logged_models([tracking.experiment_id]))
        copies = sorted((store / "mlartifacts" / "models").glob("*/artifacts/*"))
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="could not register"):
            patch.setattr(MlflowClient, call, fail)
            promote.run(recipe)
        after = versions(recipe), len(tracking.client.search_logged_models([tracking.experiment_id]))
        assert (after, sorted((store / "mlartifacts" / "models").glob("*/artifacts/*"))) == (before, copies)
        names = {model.name for model in tracking.client.search_registered_models()}
        assert (recipe.promote.registered_name in names) == registered
    assert str(champion(recipe).version) == "1"


@pytest.mark.parametrize("alias", ["latest", "Latest", "LATEST", "v2", "V10", "", "a b", "a/b", "1", "a" * 129, "é"])
def test_an_alias_that_mlflow_refuses_is_refused_when_the_recipe_is_read(alias):
    with pytest.raises(ConfigError, match=r"^promote\.alias: "):
        load_recipe([], [f"promote.alias={alias}"])


@settings(max_examples=200)
@given(st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,12}", fullmatch=True) | st.sampled_from(["v", "v1a", "latests", "vv1"]))
def test_mlflow_takes_every_name_and_alias_that_a_recipe_may_hold(name):
    try:
        section = load_recipe([], [f"promote.alias={name}", f"promote.registered_name={name}.1"]).promote
    except ConfigError:
        return
    validation._validate_model_alias_name(section.alias)
    validation._validate_model_alias_name_reserved(section.alias)
    validation._validate_model_name(section.registered_name)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("fiftyfold@champion", "is neither models:/<name>@<alias> nor models:/<name>/<version>"),
        ("models:/fiftyfold", "is neither"),
        ("models:/never@champion", "cannot get models:/never@champion .* run the promote step first"),
        ("models:/never/3", "cannot get models:/never/3"),
    ],
)
def test_unknown_model_is_named(recipe, uri, message):
    with pytest.raises(ConfigError, match=message):
        fetch(recipe, uri)


def test_evaluate_scores_the_run_of_the_checkpoint(recipe, store, capsys):
    run = train(recipe, "a", None, 100)
    result = evaluate.run(named(recipe, "a"))
    assert result.run_id == run.run_id
    stored = run.metrics()
    assert {key: value for key, value in stored.items() if key.startswith("eval/")} == result.metrics
    assert stored["eval/recall"] == stored["eval/mqar/128/recall"]
    folder = store / "mlartifacts" / run.run_id / "artifacts" / "evaluation"
    assert (folder / "recall.png").read_bytes()[:4] == b"\x89PNG"
    table = json.loads((folder / "recall.json").read_text())
    assert [row[:3] for row in table["data"]] == [
        ["mqar", 128, None],
        ["needle", 128, 0.1],
        ["needle", 128, 0.9],
        ["mqar", 256, None],
        ["needle", 256, 0.1],
        ["needle", 256, 0.9],
    ]
    printed = capsys.readouterr().out
    assert run.run_id in printed
    assert "fillers come from the standard library" in printed
    assert open_tracking(recipe).client.get_run(run.run_id).info.status == "FINISHED"

    # The checkpoint given by its path, in another run's recipe.
    section = recipe.evaluate.model_copy(update={"checkpoint": result.checkpoint, "lengths": (128,)})
    again = evaluate.run(recipe.model_copy(update={"evaluate": section}))
    assert again.run_id == run.run_id
    assert again.metrics["eval/mqar/128/recall"] == result.metrics["eval/mqar/128/recall"]


def test_evaluate_without_a_checkpoint_or_its_run(recipe):
    with pytest.raises(CheckpointError, match=r"^run\.name: .*final does not exist; run the train step first, or set"):
        evaluate.run(recipe)
    train(recipe, "a", None, 100)
    if not torch.cuda.is_available():
        on_gpu = with_overrides(named(recipe, "a"), {"train.use_gpu": True})
        with pytest.raises(ConfigError, match=r"train\.use_gpu: no CUDA device here"):
            evaluate.run(on_gpu)
    path = named(recipe, "a").run_folder / "run.json"
    content = path.read_text()
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json: expected JSON with run_id and tracking_uri"):
        evaluate.run(named(recipe, "a"))
    path.write_text(content.replace('run_id": "', 'run_id": "0'))
    with pytest.raises(ConfigError, match="not found in"):
        evaluate.run(named(recipe, "a"))


@pytest.mark.long
def test_the_same_against_a_tracking_server(tmp_path):
    """Artifacts are sent over HTTP, so nothing may rely on reading the store's files."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    command += ["--artifacts-destination", str(tmp_path / "server")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{uri}/health").status_code == 200:
                    break
            time.sleep(0.5)
        recipe = recipe_from_dict(
            {
                "run": {"folder": str(tmp_path / "runs"), "name": "a"},
                "evaluate": {"lengths": [128], "depths": [0.5], "samples": 2},
                "tracking": {"uri": uri},
            }
        )
        run = train(recipe, "b", None, 100)
        evaluate.run(named(recipe, "b"))
        result = promote.run(recipe)
        assert result.winner.run_id == run.run_id
        folder = download(open_tracking(recipe), result.model_uri, tmp_path / "served" / "deep", "key")
        assert folder.is_relative_to(tmp_path / "served")
        assert checkpoints.load(folder).config == MODEL
        assert run.url_hint() == f"{uri}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
        evaluate.run(named(recipe, "b"))  # replaces the table
        assert not (tmp_path / "runs" / "mlflow.db").exists()
        assert not (tmp_path / "runs" / "mlartifacts").exists()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
