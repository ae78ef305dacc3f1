"""Runs folders that were moved, copied, renamed or reached by a link."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.errors import ConfigError
from model.tokenizer import ByteTokenizer
from model.transformer import Transformer
from pipelines.data.manifest import MANIFEST_NAME
from pipelines.recipe.loading import recipe_from_dict, with_overrides
from pipelines.recipe.schema import Recipe
from pipelines.steps import evaluate, promote
from pipelines.tracking import connection
from pipelines.tracking.mlflow_store import attach, open_tracking
from pipelines.tracking.registry import WEIGHTS_TAG, weights_digest
from pipelines.tracking.run_folder import TRAINING_SECTIONS, bind, lock_run_folder, owner
from pipelines.tracking.served_models import ModelStore

MODEL = ModelConfig(hidden_size=32, layers=("sliding", "csa", "hca"), max_positions=512)


def recipe_in(folder: Path, name: str = "a", **sections) -> Recipe:
    evaluate = {"lengths": [128], "depths": [0.5], "samples": 2}
    return recipe_from_dict({"run": {"folder": str(folder), "name": name}, "evaluate": evaluate, **sections})


def train(recipe: Recipe, score: float = 0.9, seed: int = 0) -> str:
    """Write the results of a training; return the id of its run."""
    with open_tracking(recipe).start_run(recipe.run.name, kind="train", recipe=recipe) as run:
        torch.manual_seed(seed)
        checkpoints.save(Transformer(MODEL), recipe.final_checkpoint, ByteTokenizer())
        bind(recipe.run_folder, run)
        run.set_tags({"checkpoint": str(recipe.final_checkpoint), WEIGHTS_TAG: weights_digest(recipe.final_checkpoint)})
        run.log_metrics({"eval/recall": score})
    return run.run_id


def served(recipe: Recipe) -> Path:
    """Return the checkpoint that ``deploy`` serves."""
    return ModelStore(recipe).find()[0].checkpoint


def files(folder: Path) -> dict[str, str]:
    """Return a digest of every file, except locks."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.fixture
def original(tmp_path) -> Path:
    """A runs folder with a run and a registered version."""
    folder = tmp_path / "original"
    train(recipe_in(folder))
    promote.run(recipe_in(folder))
    return folder


@pytest.mark.parametrize("keep", [False, True])
def test_a_moved_or_copied_folder_is_used_instead_of_the_original(original, tmp_path, capsys, keep):
    folder = tmp_path / "a b#é'c%41?"
    shutil.copytree(original, folder)
    if keep:
        before = files(original)
    else:
        shutil.rmtree(original)
    capsys.readouterr()
    recipe = recipe_in(folder)
    evaluated = evaluate.run(recipe)
    assert f"{folder}: was moved or copied from {original}; updated the paths" in capsys.readouterr().out
    run = open_tracking(recipe).client.get_run(evaluated.run_id)
    assert run.data.metrics["eval/mqar/128/recall"] == evaluated.metrics["eval/mqar/128/recall"]
    assert (folder / "mlartifacts" / evaluated.run_id / "artifacts" / "evaluation" / "recall.json").is_file()
    assert run.data.tags["checkpoint"] == str(recipe.final_checkpoint)

    assert served(recipe_in(folder, serve={"model_uri": "models:/fiftyfold/1"})).is_relative_to(folder)
    promoted = promote.run(recipe)
    assert promoted.version == "2" and promoted.winner.checkpoint == recipe.final_checkpoint
    assert served(recipe).is_relative_to(folder)
    new = train(recipe_in(folder, "b"))
    assert (folder / "mlartifacts" / new / "artifacts" / "config.yaml").is_file()
    assert "moved" not in capsys.readouterr().out
    if keep:
        assert files(original) == before
    else:
        assert not original.exists()
        folder.rename(original)  # back again
        assert served(recipe_in(original)).is_relative_to(original)


def test_a_copied_folder_promotes_its_own_checkpoint(original, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)
    recipe = recipe_in(folder)
    torch.manual_seed(5)
    checkpoints.save(Transformer(MODEL), recipe.final_checkpoint, ByteTokenizer())
    evaluate.run(recipe)
    promote.run(recipe)
    assert weights_digest(served(recipe)) == weights_digest(recipe.final_checkpoint)
    assert weights_digest(served(recipe_in(original))) != weights_digest(recipe.final_checkpoint)


def test_a_link_to_a_runs_folder_changes_nothing_stored(original, tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(original)
    before = artifact_uris(original)
    capsys.readouterr()
    assert promote.run(recipe_in(link)).winner.checkpoint.samefile(recipe_in(original).final_checkpoint)
    assert served(recipe_in(original)).is_dir()
    assert "moved" not in capsys.readouterr().out
    assert artifact_uris(link) == before
    evaluated = evaluate.run(recipe_in(link))
    assert (original / "mlartifacts" / evaluated.run_id / "artifacts" / "evaluation").is_dir()

    # A link to the checkpoint alone finds its run, too.
    (tmp_path / "final").symlink_to(recipe_in(original).final_checkpoint)
    section = recipe_in(link).evaluate.model_copy(update={"checkpoint": tmp_path / "final"})
    elsewhere = recipe_in(tmp_path / "elsewhere").model_copy(update={"evaluate": section})
    assert evaluate.run(elsewhere).run_id == evaluated.run_id
    assert not (tmp_path / "elsewhere").exists()


def artifact_uris(folder: Path) -> set[str]:
    client = open_tracking(recipe_in(folder)).client
    return {run.info.artifact_uri for run in client.search_runs([e.experiment_id for e in client.search_experiments()])}


def test_a_run_folder_that_was_renamed_is_still_found(original):
    (original / "a").rename(original / "renamed")
    recipe = recipe_in(original, "renamed")
    assert promote.run(recipe).winner.checkpoint == recipe.final_checkpoint
    evaluate.run(recipe)


def test_a_run_of_another_runs_folder_is_refused(tmp_path, capsys):
    """Two runs folders with equal run names share a store."""
    uri = f"sqlite:///{tmp_path}/shared.db"
    one, other = (recipe_in(tmp_path / name, tracking={"uri": uri}) for name in ("one", "other"))
    train(one, 0.9, seed=1)
    second = train(other, 0.5, seed=2)
    result = promote.run(other)
    assert result.winner.run_id == second and result.winner.checkpoint == other.final_checkpoint
    reason = f"its checkpoint {one.final_checkpoint} is not in run.folder {other.run.folder}\n"
    assert reason in capsys.readouterr().out
    assert (tmp_path / "mlartifacts").is_dir()  # next to the database, not in the folder that created the experiment
    assert not (tmp_path / "one" / "mlartifacts").exists()


def test_a_moved_folder_with_a_shared_store_promotes_its_own_checkpoint(tmp_path):
    tracking = {"uri": f"sqlite:///{tmp_path}/shared.db"}
    train(recipe_in(tmp_path / "old", tracking=tracking))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    moved = recipe_in(tmp_path / "new", tracking=tracking)
    assert promote.run(moved).winner.checkpoint == moved.final_checkpoint


def test_artifacts_left_behind_are_named(original, tmp_path):
    folder = tmp_path / "partial"
    folder.mkdir()
    shutil.copy(original / "mlflow.db", folder)
    with pytest.raises(ConfigError, match=f"{folder}: was moved or copied from {original} without its artifacts"):
        promote.run(recipe_in(folder))
    shutil.copytree(original / "mlartifacts", folder / "mlartifacts")
    with pytest.raises(ConfigError, match=r"is not in run\.folder|is gone"):
        promote.run(recipe_in(folder))


def test_a_moved_read_only_folder_is_refused_with_advice(original, tmp_path, monkeypatch):
    folder = tmp_path / "moved"
    original.rename(folder)
    database = folder / "mlflow.db"
    connect = connection.update_paths.__globals__["sqlite3"].connect

    def read_only(path, **options):
        return connect(path, **options) if options.get("uri") else connect(f"file:{path}?mode=ro", uri=True)

    monkeypatch.setattr("pipelines.tracking.relocation.sqlite3.connect", read_only)
    before = sha256(database.read_bytes()).hexdigest()
    with pytest.raises(
        ConfigError, match=rf"{folder}: was moved or copied from {original}, and .* make the folder wri"
    ):
        served(recipe_in(folder))
    assert sha256(database.read_bytes()).hexdigest() == before


def test_a_read_only_folder_can_be_served_and_results_are_refused_before_any_compute(original, monkeypatch):
    def refuse(path, mode):
        return mode != os.W_OK or not Path(path).is_relative_to(original)

    def open_read_only(path, mode="r", *arguments, **options):
        if "w" in mode and Path(path).is_relative_to(original):
            raise OSError(30, "Read-only file system", str(path))
        return real_open(path, mode, *arguments, **options)

    real_open = Path.open
    monkeypatch.setattr(os, "access", refuse)
    monkeypatch.setattr(Path, "open", open_read_only)
    monkeypatch.setattr("pipelines.steps.evaluate.score_tasks", lambda *_, **__: pytest.fail("scored"))
    assert served(recipe_in(original)).is_dir()
    for step in (evaluate, promote):
        with pytest.raises(ConfigError, match=rf"^run\.folder: {original}\S* cannot be written to"):
            step.run(recipe_in(original))
    by_uri = with_overrides(recipe_in(original), {"tracking.uri": f"sqlite:///{original}/mlflow.db"})
    with pytest.raises(ConfigError, match=rf"^tracking\.uri: {original}\S* cannot be written to"):
        evaluate.run(by_uri)
    (original / "mlflow.db").unlink()
    with pytest.raises(ConfigError, match=rf"^run\.folder: {original}\S* cannot be written to"):
        open_tracking(recipe_in(original))


def test_run_json_of_earlier_versions_with_an_absolute_path_is_mended(original, tmp_path):
    path = original / "a" / "run.json"
    content = json.loads(path.read_text())
    assert content["tracking_uri"] == "sqlite:///../mlflow.db"
    path.write_text(json.dumps(content | {"tracking_uri": f"sqlite:///{original}/mlflow.db"}))
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)
    before = files(original)
    evaluate.run(recipe_in(folder))
    assert files(original) == before
    assert json.loads((folder / "a" / "run.json").read_text()) == content


def test_a_missing_store_is_named_and_not_created(original):
    reference = json.loads((original / "a" / "run.json").read_text())
    (original / "mlflow.db").unlink()
    with pytest.raises(ConfigError, match=rf"{original}/mlflow\.db: no such tracking store"):
        evaluate.run(recipe_in(original))
    with pytest.raises(ConfigError, match="no such tracking store"):
        attach(f"sqlite:///{original}/mlflow.db", reference["run_id"])
    assert not (original / "mlflow.db").exists()


def test_the_default_experiment_writes_next_to_the_database(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_in(tmp_path / "runs", tracking={"experiment": "Default"})
    run_id = train(recipe)
    assert (tmp_path / "runs" / "mlartifacts" / run_id / "artifacts" / "config.yaml").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_settings_with_paths_in_the_runs_folder_survive_a_move(tmp_path):
    def bound(folder: Path, init_from: Path):
        recipe = recipe_in(folder, train={"init_from": str(init_from)})
        recipe.data_folder.mkdir(parents=True, exist_ok=True)
        (recipe.data_folder / MANIFEST_NAME).write_text("{}")
        with lock_run_folder(recipe.run_folder, recipe, TRAINING_SECTIONS, "run.name"):
            pass

    old, new = tmp_path / "old", tmp_path / "new"
    bound(old, old / "hybrid" / "final")
    bound(old, old / "hybrid" / "final")
    old.rename(new)
    bound(new, new / "hybrid" / "final")
    for other in (new / "b" / "final", old / "hybrid" / "final"):
        with pytest.raises(ConfigError, match=r"was started with another train\.init_from"):
            bound(new, other)


def test_the_owner_of_a_checkpoint_follows_run_json(original):
    recipe = recipe_in(original)
    assert owner(recipe.final_checkpoint) == json.loads((original / "a" / "run.json").read_text())["run_id"]
    assert owner(original / "nothing" / "final") is None
