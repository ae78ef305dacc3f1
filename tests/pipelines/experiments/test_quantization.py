"""Scores of networks with and without quantization."""

from model import checkpoint
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from pipelines.experiments.quantization import score_variants
from pipelines.recipe.loading import with_overrides
from pipelines.training.validation import held_out_batches, validate


def test_networks_are_scored_in_the_attention_mode_of_the_last_stage(prepared, tmp_path):
    model = Transformer(prepared.model)
    checkpoint.save(model, tmp_path / "final", load_tokenizer("byte"))
    for attention in ("dense", "sparse"):
        recipe = with_overrides(prepared, {"train.stages": [{"attention": attention, "steps": 1}]})
        found = score_variants(recipe, [tmp_path / "final"], [tmp_path / "final"])["with QAT, quantized"]["loss"]
        assert found == [validate(model.eval(), held_out_batches(recipe), attention)["validation/loss"]]
        others = "sparse" if attention == "dense" else "dense"
        assert found != [validate(model.eval(), held_out_batches(recipe), others)["validation/loss"]]
