"""Scores of networks with and without quantization."""

import shutil

import pytest

from model import checkpoint
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from pipelines.experiments.arms import Arm
from pipelines.experiments.quantization import score_variants
from pipelines.experiments.trials import FINAL, plan
from pipelines.recipe.loading import with_overrides
from pipelines.training.validation import held_out_batches, validate


@pytest.fixture
def own_folder(prepared, tmp_path):
    """Prepared recipe with a run folder that no other test uses."""
    (tmp_path / "data").symlink_to(prepared.data_folder.parent)
    return with_overrides(prepared, {"run.folder": str(tmp_path)})


def test_networks_are_scored_in_the_attention_mode_of_the_last_stage(own_folder):
    model = Transformer(own_folder.model)
    for attention in ("dense", "sparse"):
        recipe = with_overrides(own_folder, {"train.stages": [{"attention": attention, "steps": 1}]})
        trial = plan(Arm("full", "full", recipe), 0, 1.0)
        checkpoint.save(model, trial.folder / FINAL, load_tokenizer("byte"))
        found = score_variants(recipe, [trial], [trial])["with QAT, quantized"]["loss"]
        assert found == [validate(model.eval(), held_out_batches(recipe), attention)["validation/loss"]]
        others = "sparse" if attention == "dense" else "dense"
        assert found != [validate(model.eval(), held_out_batches(recipe), others)["validation/loss"]]


def test_stored_scores_are_reused(own_folder):
    trial = plan(Arm("full", "full", own_folder), 0, 1.0)
    checkpoint.save(Transformer(own_folder.model), trial.folder / FINAL, load_tokenizer("byte"))
    found = score_variants(own_folder, [trial], [trial])
    shutil.rmtree(trial.folder / FINAL)
    assert score_variants(own_folder, [trial], [trial]) == found
