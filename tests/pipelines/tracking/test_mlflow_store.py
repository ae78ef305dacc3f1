"""The MLflow store: one per run folder, safe to open from many processes, without process-wide state."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import matplotlib.figure
import mlflow
import mlflow.store.db.utils as stores
import pytest
import tracking_stores
from mlflow import MlflowClient
from sqlalchemy import create_engine

from model.errors import ConfigError
from pipelines.recipe.loading import load_recipe, recipe_from_dict
from pipelines.recipe.paths import sqlite_path
from pipelines.recipe.schema import Recipe
from pipelines.tracking.connection import default_uri
from pipelines.tracking.mlflow_store import attach, git_tags, open_tracking, ui_command

ROOT = Path(__file__).parents[3]


def recipe_in(folder: Path, **sections) -> Recipe:
    return recipe_from_dict({"run": {"folder": str(folder), "name": "a"}, **sections})


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A run folder shared by tests that need no fresh database, which takes a second to create."""
    return tmp_path_factory.mktemp("runs")


def test_run_records_recipe_tags_and_metrics(store):
    recipe = recipe_in(store, train={"stages": [{"attention": "dense", "steps": 3}, {"steps": 4}]})
    tracking = open_tracking(recipe)
    with tracking.start_run("a", kind="train", recipe=recipe) as run:
        run.log_metrics({"train/loss": 2.0, "train/lr": 0.1}, step=1)
        run.log_metrics({"train/loss": 1.5}, step=2)
    child = tracking.start_run("t", kind="trial", recipe=recipe, parent_run_id=run.run_id)
    child.finish("KILLED")

    stored = tracking.client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "a"
    params = stored.data.params
    assert params["train.stages.0.attention"] == "dense"
    assert params["train.stages.1.steps"] == "4"
    assert params["model.layers"] == '["sliding", "csa", "hca", "csa"]'
    assert params["model.zero_init_output"] == "false"
    assert params["tracking.uri"] == "null"
    assert stored.data.tags["kind"] == "train"
    assert set(git_tags()) <= set(stored.data.tags)
    assert run.metrics() == {"train/loss": 1.5, "train/lr": 0.1}
    assert [m.step for m in tracking.client.get_metric_history(run.run_id, "train/loss")] == [1, 2]
    nested = tracking.client.search_runs(
        [tracking.experiment_id], f"tags.`mlflow.parentRunId` = '{run.run_id}' and tags.kind = 'trial'"
    )
    assert [(r.info.run_id, r.info.status) for r in nested] == [(child.run_id, "KILLED")]

    # The artifact is a valid recipe and is stored in the run folder.
    assert load_recipe([store / "mlartifacts" / run.run_id / "artifacts" / "config.yaml"], []) == recipe


def test_a_run_stores_no_password(store):
    tracking = open_tracking(recipe_in(store))
    recipe = recipe_in(store, tracking={"uri": "postgresql://user:secret@host/db"})
    run_id = tracking.start_run("a", kind="train", recipe=recipe).run_id
    assert tracking.client.get_run(run_id).data.params["tracking.uri"] == "postgresql://host/db"
    for path in (store / "mlartifacts" / run_id).rglob("*"):
        assert path.is_dir() or "secret" not in path.read_text()
    tracking.start_run("a", kind="train", recipe=recipe, run_id=run_id)
    assert "resumed.changed" not in tracking.client.get_run(run_id).data.tags


def test_all_pages_of_a_search_are_read(store, monkeypatch):
    recipe = recipe_in(store, tracking={"experiment": "pages"})
    tracking = open_tracking(recipe)
    names = [str(i) for i in range(5)]
    for name in names:
        tracking.client.create_run(
            tracking.experiment_id, run_name=name, tags={"parity": "odd" if int(name) % 2 else "even"}
        )
    search = MlflowClient.search_runs
    monkeypatch.setattr(
        MlflowClient, "search_runs", lambda self, *given, **options: search(self, *given, **options, max_results=2)
    )
    assert sorted(run.info.run_name for run in tracking.search_runs()) == names
    assert sorted(run.info.run_name for run in tracking.search_runs("tags.parity = 'even'")) == ["0", "2", "4"]


def test_default_recipe_has_no_parameter_lost(store):
    """The recipe has more than MLflow's 100 parameters per request. Values beyond its limit are truncated."""
    recipe = recipe_in(store, data={"sources": ["x" * 200] * 35})
    tracking = open_tracking(recipe)
    run_id = tracking.start_run("a", kind="train", recipe=recipe).run_id
    params = tracking.client.get_run(run_id).data.params
    assert len(params) > 100
    assert len(params["data.sources"]) == 6000
    tracking.start_run("a", kind="train", recipe=recipe, run_id=run_id)
    assert "resumed.changed" not in tracking.client.get_run(run_id).data.tags


def test_artifacts_figure_and_table(store, tmp_path):
    recipe = recipe_in(store)
    run = open_tracking(recipe).start_run("a", kind="train", recipe=recipe)
    (tmp_path / "note.txt").write_text("hello")
    run.log_artifact(tmp_path / "note.txt")
    run.log_dict({"a": 1}, "extra.json")
    figure = matplotlib.figure.Figure()
    figure.subplots().plot([1, 2])
    run.log_figure(figure, "figures/curve.png")
    run.log_table({"length": [256], "recall": [0.5]}, "tables/recall.json")
    run.log_table({"length": [256, 512], "recall": [0.75, 0.25]}, "tables/recall.json")

    folder = store / "mlartifacts" / run.run_id / "artifacts"
    assert (folder / "note.txt").read_text() == "hello"
    assert (folder / "figures" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    table = json.loads((folder / "tables" / "recall.json").read_text())
    assert table == {"columns": ["length", "recall"], "data": [[256, 0.75], [512, 0.25]]}  # replaced, not appended
    tags = open_tracking(recipe).client.get_run(run.run_id).data.tags
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "tables/recall.json", "type": "table"}]


def test_numbers_that_are_not_finite_are_told_not_stored(store, capsys):
    recipe = recipe_in(store)
    tracking = open_tracking(recipe)
    run = tracking.start_run("a", kind="train", recipe=recipe)
    run.log_metrics({"loss": float("nan"), "norm": float("inf"), "ok": 1}, step=7)
    run.log_metrics({"loss": float("nan"), "norm": 2.0}, step=8)
    assert run.metrics() == {"ok": 1.0, "norm": 2.0}
    tags = tracking.client.get_run(run.run_id).data.tags
    assert tags["not_finite.loss"] == "nan at step 7"
    assert tags["not_finite.norm"] == "inf at step 7"
    assert capsys.readouterr().out.count("metric loss is nan at step 7") == 1


def test_attach_and_resume_go_on_with_the_same_run(store):
    recipe = recipe_in(store)
    tracking = open_tracking(recipe)
    first = tracking.start_run("a", kind="train", recipe=recipe)
    with pytest.raises(RuntimeError), first:
        raise RuntimeError("worker lost")
    assert tracking.client.get_run(first.run_id).info.status == "FAILED"

    again = tracking.start_run("a", kind="train", recipe=recipe, run_id=first.run_id)
    assert again.run_id == first.run_id
    assert tracking.client.get_run(first.run_id).info.status == "RUNNING"
    assert "resumed.changed" not in tracking.client.get_run(first.run_id).data.tags

    longer = recipe_in(store, train={"batch_rows": 64})
    tracking.start_run("a", kind="train", recipe=longer, run_id=first.run_id)
    assert tracking.client.get_run(first.run_id).data.tags["resumed.changed"] == "train.batch_rows: 32 -> 64"

    worker = attach(tracking.uri, first.run_id)
    worker.log_metrics({"x": 1.0})
    assert first.metrics() == {"x": 1.0}
    assert worker.experiment_id == tracking.experiment_id
    assert first.run_id in worker.url_hint()
    with pytest.raises(ConfigError, match="run nothing: not found"):
        attach(tracking.uri, "nothing")


def test_a_block_s_own_error_says_more_than_a_store_that_is_gone(store, capsys):
    recipe = recipe_in(store)
    run = open_tracking(recipe).start_run("gone", kind="train", recipe=recipe)
    with pytest.raises(InterruptedError), run:
        run._client = None
        raise InterruptedError
    assert f"run {run.run_id}: left as running" in capsys.readouterr().out


def test_nothing_leaks_into_the_process(store):
    recipe = recipe_in(store)
    before = mlflow.get_tracking_uri()
    with open_tracking(recipe).start_run("a", kind="train", recipe=recipe):
        pass
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert "MLFLOW_EXPERIMENT_ID" not in os.environ


def test_telemetry_is_off():
    code = (
        "import pipelines.tracking.mlflow_store\n"
        "from mlflow.telemetry import get_telemetry_client\n"
        "assert get_telemetry_client() is None"
    )
    # MLflow disables telemetry under pytest and in CI, so their variables must not reach this process.
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, check=True)


def test_stores_of_tests_have_the_tables_of_mlflow(tmp_path):
    found = []
    for make in (tracking_stores.MIGRATE, stores._initialize_tables, stores._initialize_tables):
        file = tmp_path / f"{len(found)}.db"
        make(create_engine(f"sqlite:///{file}"))
        with closing(sqlite3.connect(file)) as database:
            rows = database.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
            # Migrations write the constraints of a table in any order.
            tables = [(kind, name, sorted(re.split(r",?\s*\n", sql or ""))) for kind, name, sql in rows]
            found.append((tables, database.execute("SELECT * FROM alembic_version").fetchall()))
    assert found[0] == found[1] == found[2] and len(found[0][0]) > 10


def open_at_once(barrier, results, recipe):
    stores._initialize_tables = tracking_stores.MIGRATE
    barrier.wait()
    tracking = open_tracking(recipe)
    tracking.start_run("a", kind="train", recipe=recipe).finish()
    results.put(tracking.experiment_id)


def test_first_use_from_four_processes_at_once(tmp_path):
    """Concurrent migrations of a fresh database fail in MLflow, so a lock serializes them."""
    recipe = recipe_in(tmp_path)
    context = multiprocessing.get_context("fork")  # imports are inherited, so all four start within milliseconds
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=open_at_once, args=(barrier, results, recipe)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len({results.get() for _ in processes}) == 1
    tracking = open_tracking(recipe)
    assert len(tracking.client.search_runs([tracking.experiment_id])) == 4


@pytest.mark.parametrize("name", ["a b%20c#d?e", "my runs", "*", "[v]", "é", "a+b@c:d;e&f'g"])
def test_folder_names_that_need_escaping(tmp_path, name):
    folder = tmp_path / name
    recipe = recipe_in(folder)
    tracking = open_tracking(recipe)
    run = tracking.start_run("a", kind="train", recipe=recipe)
    assert sorted(path.name for path in folder.iterdir()) == ["mlartifacts", "mlflow.db", "mlflow.db.lock"]
    assert (folder / "mlartifacts" / run.run_id / "artifacts" / "config.yaml").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]  # and no folder with the escapes of the URI
    assert attach(run.uri, run.run_id).run_id == run.run_id
    assert attach(str(run.uri).replace("%2F", "/"), run.run_id).run_id == run.run_id  # as written by hand
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["runs", "moved [v2] %41#x", "it's $HOME", "a;b", "100%25"])
def test_the_printed_command_opens_the_ui_of_any_folder(tmp_path, name):
    """Shell and Make hand the folder on to :mod:`pipelines.tracking.ui` unchanged."""
    folder = tmp_path / name
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s %s %s" "$1" "$2" "$RUNS"\n')
    python.chmod(0o755)
    command = ui_command(default_uri(folder))
    assert command.startswith("make ui ")
    command = command.replace("make", f"make --no-print-directory --old-file .venv BIN={python.parent}", 1)
    printed = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == f"-m pipelines.tracking.ui {folder}"


def test_a_database_of_another_name_is_opened_by_its_uri(tmp_path):
    command = shlex.split(ui_command(default_uri(tmp_path / "a b").replace("mlflow.db", "other.db")))
    assert command[:3] == ["mlflow", "server", "--backend-store-uri"]
    assert sqlite_path(command[3]) == tmp_path / "a b" / "other.db"


def test_another_database_by_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_in(tmp_path / "runs", tracking={"uri": "sqlite:///other.db", "experiment": "x"})
    tracking = open_tracking(recipe)
    assert tracking.uri == f"sqlite:///{tmp_path}/other.db"
    tracking.start_run("a", kind="train", recipe=recipe)
    assert (tmp_path / "other.db").is_file()
    assert not (tmp_path / "runs" / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("/some/folder", "begins with one of .*, found '/some/folder'"),
        ("file:///some/folder", "begins with one of"),
        ("sqlite://", "names a file"),
        ("sqlite:////nowhere/at/all/x.db", "folder /nowhere/at/all of"),
        ("mssql://user:secret@host/db", r"tracking\.uri: mssql://host/db needs the Python package '\w+'; install it$"),
        ("http://user:secret@127.0.0.1:9", "nothing answers at http://127.0.0.1:9"),
    ],
)
def test_unusable_uri_is_named_at_once(tmp_path, uri, message):
    start = time.monotonic()
    with pytest.raises(ConfigError, match=message) as caught:
        open_tracking(recipe_in(tmp_path, tracking={"uri": uri}))
    assert "secret" not in str(caught.value)
    assert time.monotonic() - start < 60  # MLflow's own client would retry for minutes
    assert not (tmp_path / "mlflow.db").exists()


def test_file_that_is_no_database(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is not a database at all")
    with pytest.raises(ConfigError, match=r"mlflow\.db is not an SQLite database"):
        open_tracking(recipe_in(tmp_path))


def test_deleted_experiment_is_named(store):
    recipe = recipe_in(store, tracking={"experiment": "gone"})
    tracking = open_tracking(recipe)
    tracking.client.delete_experiment(tracking.experiment_id)
    with pytest.raises(ConfigError, match="'gone' was deleted"):
        open_tracking(recipe)
