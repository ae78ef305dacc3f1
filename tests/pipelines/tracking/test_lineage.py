"""Source, data set and system metrics of a run, as MLflow's UI shows them."""

from __future__ import annotations

import getpass
import json
import threading
import time
from hashlib import sha256

import mlflow.data
import pytest

from pipelines.data.manifest import MANIFEST_NAME, read_manifest
from pipelines.recipe.loading import recipe_from_dict, with_overrides
from pipelines.tracking import lineage
from pipelines.tracking.lineage import dataset_input, source_tags
from pipelines.tracking.mlflow_store import open_tracking
from pipelines.tracking.system_metrics import system_metrics

KNOWN, UNKNOWN = {"git.commit": "a" * 40}, {"git.commit": "unknown"}


def test_source_tags_hold_the_command_and_a_known_commit(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    tags = source_tags("trial", KNOWN)
    assert tags == {
        "mlflow.source.name": "python -m pipelines sweep",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": "a" * 40,
        "mlflow.user": getpass.getuser(),
    }
    assert "mlflow.source.git.commit" not in source_tags("train", UNKNOWN)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert source_tags("train", KNOWN)["mlflow.source.type"] == "JOB"


def test_a_run_has_the_columns_source_user_version_and_dataset(prepared, monkeypatch):
    monkeypatch.setattr("pipelines.tracking.mlflow_store.git_tags", lambda: KNOWN)
    recipe = with_overrides(prepared, {"run.name": "lineage"})
    tracking = open_tracking(recipe)
    run = tracking.start_run("lineage", kind="train", recipe=recipe)
    manifest = read_manifest(recipe.data_folder)
    for context in ("training", "evaluation"):  # an evaluation of the run on the same data
        run.log_dataset(dataset_input(recipe.data_folder, manifest, context))
    run.finish()
    stored = tracking.client.get_run(run.run_id)
    assert stored.info.user_id == getpass.getuser()
    assert source_tags("train", KNOWN).items() <= stored.data.tags.items()
    (found,) = stored.inputs.dataset_inputs
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]
    assert found.dataset.name == "small"
    assert sha256((recipe.data_folder / MANIFEST_NAME).read_bytes()).hexdigest().startswith(found.dataset.digest)
    assert mlflow.data.get_source(found.dataset).load() == str(recipe.data_folder)
    profile = json.loads(found.dataset.profile)
    tokens = sum(shard.tokens for part in manifest.splits.values() for shard in part.shards)
    assert profile["num_tokens"] == tokens == profile["train_tokens"] + profile["validation_tokens"]


@pytest.fixture
def run(tmp_path):
    recipe = recipe_from_dict({"run": {"folder": str(tmp_path), "name": "a"}})
    return open_tracking(recipe).start_run("a", kind="train", recipe=recipe)


def test_system_metrics_are_logged_during_the_block_only(run):
    run.finish()  # like that of an evaluated checkpoint
    with system_metrics(run, 0.05, "system/evaluation/"):
        while not run.metrics():
            time.sleep(0.05)
    logged = run.metrics()
    assert 0 <= logged["system/evaluation/cpu_utilization_percentage"] <= 100
    assert logged["system/evaluation/system_memory_usage_megabytes"] > 0
    time.sleep(0.3)
    assert run.metrics() == logged


def test_without_an_interval_there_are_no_system_metrics(run):
    with system_metrics(run, None):
        time.sleep(0.3)
    assert run.metrics() == {}


def test_an_unreachable_store_ends_system_metrics_but_not_the_block(run, monkeypatch, capsys):
    tried = threading.Event()

    def fail(*_, **__):
        tried.set()
        raise ConnectionError("no route")

    monkeypatch.setattr(run, "log_metrics", fail)
    with system_metrics(run, 0.02):
        assert tried.wait(300)
        time.sleep(0.2)  # ten intervals, for a second message
    assert capsys.readouterr().out.count("no more system metrics (no route)") == 1


def test_a_user_without_a_name_is_recorded_by_number(monkeypatch):
    def fail():
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(lineage.getpass, "getuser", fail)
    monkeypatch.setattr(lineage.os, "getuid", lambda: 1234)
    assert source_tags("train", UNKNOWN)["mlflow.user"] == "1234"
