"""The evaluate step: tasks, their settings, and what is logged and printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.hf import export_pretrained
from model.tokenizer import ByteTokenizer
from model.transformer import Transformer
from pipelines.recipe.loading import recipe_from_dict
from pipelines.recipe.schema import Recipe
from pipelines.steps import evaluate, promote
from pipelines.tracking.mlflow_store import open_tracking
from pipelines.tracking.run_folder import bind

MODEL = ModelConfig(hidden_size=32, layers=("sliding", "csa", "hca"), max_positions=512)


def recipe_with(folder: Path, data: dict | None = None, **section) -> Recipe:
    section = {"lengths": [128, 256], "depths": [0.5, 1.0], "samples": 3, **section}
    return recipe_from_dict({"run": {"folder": str(folder)}, "evaluate": section, "data": data or {}})


def train(recipe: Recipe) -> None:
    """Write the results of a training."""
    with open_tracking(recipe).start_run(recipe.run.name, kind="train", recipe=recipe) as run:
        torch.manual_seed(0)
        checkpoints.save(Transformer(MODEL), recipe.final_checkpoint, ByteTokenizer())
        bind(recipe.run_folder, run)


def test_scores_perplexities_and_effective_lengths_are_logged(tmp_path, capsys):
    settings = {"task_settings": {"multi_key": {"keys": 3}}, "pairs": 4}
    recipe = recipe_with(tmp_path, settings, tasks=["mqar", "multi_key", "perplexity"], distance=60)
    train(recipe)
    result = evaluate.run(recipe)
    logged = open_tracking(recipe).client.get_run(result.run_id).data.metrics
    for name in (
        "mqar/128/recall",
        "multi_key/256/recall",
        "perplexity/256/0.5/perplexity",
        "perplexity/effective_length",
    ):
        assert logged[f"eval/{name}"] == result.metrics[f"eval/{name}"]
    assert result.metrics["eval/mqar/128/questions"] == 12
    output = capsys.readouterr().out
    assert "perplexity by position" in output and "effective length: score above 85% of that at 128 tokens" in output
    assert "no better than chance" in output
    artifacts = tmp_path / "mlartifacts" / result.run_id / "artifacts" / "evaluation"
    assert {path.name for path in artifacts.iterdir()} == {"recall.json", "recall.png", "perplexity.json"}


def test_perplexity_alone_has_no_recall(tmp_path):
    recipe = recipe_with(tmp_path, tasks=["perplexity"], lengths=[128])
    train(recipe)
    result = evaluate.run(recipe)
    artifacts = tmp_path / "mlartifacts" / result.run_id / "artifacts" / "evaluation"
    assert [path.name for path in artifacts.iterdir()] == ["perplexity.json"]


def test_a_checkpoint_without_a_training_run_is_scored_in_a_run_of_its_own(tmp_path, capsys):
    checkpoint = tmp_path / "elsewhere" / "imported"
    torch.manual_seed(0)
    checkpoints.save(Transformer(MODEL), checkpoint, ByteTokenizer())
    recipe = recipe_with(tmp_path / "runs", tasks=["mqar"], lengths=[128], checkpoint=str(checkpoint))
    result = evaluate.run(recipe)
    assert "the scores go to the new run 'elsewhere/imported'" in capsys.readouterr().out
    tracking = open_tracking(recipe)
    stored = tracking.client.get_run(result.run_id)
    assert (stored.info.status, stored.data.tags["kind"]) == ("FINISHED", "evaluate")
    assert stored.data.params["model.hidden_size"] == "32"  # of the checkpoint, not of the recipe
    assert stored.data.metrics["eval/mqar/128/recall"] == result.metrics["eval/mqar/128/recall"]
    assert [path.name for path in checkpoint.parent.iterdir()] == ["imported"]
    with pytest.raises(ConfigError, match="none was trained yet"):  # what is not in run.folder is not registered
        promote.run(recipe)


def test_an_evaluation_that_fails_marks_its_own_run_as_failed(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(evaluate, "score_tasks", fail)
    checkpoints.save(Transformer(MODEL), tmp_path / "a", ByteTokenizer())
    recipe = recipe_with(tmp_path / "runs", checkpoint=str(tmp_path / "a"))
    with pytest.raises(RuntimeError, match="broken"):
        evaluate.run(recipe)
    tracking = open_tracking(recipe)
    assert [run.info.status for run in tracking.client.search_runs([tracking.experiment_id])] == ["FAILED"]


def test_a_checkpoint_that_does_not_exist_is_named_by_its_key(tmp_path):
    recipe = recipe_with(tmp_path / "runs", checkpoint=str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"^evaluate\.checkpoint: expected a checkpoint folder, found '/.*none'$"):
        evaluate.run(recipe)


def test_a_damaged_checkpoint_leaves_no_run(tmp_path):
    checkpoints.save(Transformer(MODEL), tmp_path / "a", ByteTokenizer())
    weights = tmp_path / "a" / checkpoints.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    recipe = recipe_with(tmp_path / "runs", checkpoint=str(tmp_path / "a"))
    with pytest.raises(CheckpointError, match=rf"{weights.name}: "):
        evaluate.run(recipe)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("section", "tokenizer", "message"),
    [
        ({"lengths": [4096]}, ByteTokenizer(), "exceeds the model's context"),
        ({"distance": 2}, ByteTokenizer(), r"^evaluate\.distance: 2 proves nothing"),
        ({}, None, r"^evaluate\.checkpoint: /.*/a/tokenizer\.json: No such file"),
    ],
)
def test_a_checkpoint_that_cannot_be_scored_leaves_no_run(tmp_path, section, tokenizer, message):
    checkpoints.save(Transformer(MODEL), tmp_path / "a", tokenizer)
    recipe = recipe_with(tmp_path / "runs", checkpoint=str(tmp_path / "a"), **section)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        evaluate.run(recipe)
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_transformers_is_refused_with_the_way_to_convert_it(tmp_path):
    export_pretrained(Transformer(ModelConfig.from_preset("tiny")), tmp_path / "hf")
    recipe = recipe_with(tmp_path / "runs", checkpoint=str(tmp_path / "hf"))
    with pytest.raises(CheckpointError, match="convert it with the export step and --format fiftyfold"):
        evaluate.run(recipe)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("data", "section", "message"),
    [
        ({}, {"tasks": ["ruler"]}, r"^evaluate\.tasks: 'ruler' is not one of mqar, needle, .*, perplexity$"),
        ({}, {"lengths": [128, 128]}, r"^evaluate\.lengths: expected at least one value without duplicates"),
        (
            {"task_settings": {"multi_key": {"pairs": 3}}},
            {"tasks": ["multi_key"]},
            r"^data\.task_settings\.multi_key\.pairs: is not one of its settings \(keys\)$",
        ),
        (
            {},
            {"lengths": [4096]},
            r"^evaluate\.lengths: 4096 exceeds the model's context; choose lengths up to 512 tokens",
        ),
        ({}, {"distance": 20}, r"^evaluate\.distance: 20 proves nothing"),
        (
            {},
            {"tasks": ["residue"], "samples": 1},
            r"^evaluate\.samples: .* document of each of 32 lengths of residue, found 1$",
        ),
    ],
)
def test_unknown_and_vacuous_settings_are_refused(tmp_path, data, section, message):
    recipe = recipe_with(tmp_path, data, **section)
    train(recipe)
    with pytest.raises(ConfigError, match=message):
        evaluate.run(recipe)


def test_a_length_without_room_for_the_facts_is_named_by_its_key(tmp_path):
    recipe = recipe_with(tmp_path, tasks=["mqar"], lengths=[32])
    train(recipe)
    with pytest.raises(ConfigError, match=r"^evaluate\.lengths: 32 tokens are too few for 8 facts of mqar"):
        evaluate.run(recipe)
