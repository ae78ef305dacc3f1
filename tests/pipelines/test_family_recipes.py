"""Recipes of the families: training, evaluation, and the way to transformers and back."""

import pytest
import torch
from plain_training import Record, trainer_for

from evals.run import evaluate
from model import checkpoint
from model.errors import ConfigError
from model.hf import import_pretrained
from model.presets import PRESETS
from pipelines.recipe.loading import load_recipe, with_overrides
from pipelines.steps import export
from pipelines.training.curriculum import total_steps

FAMILIES = ("v32", "mamba2", "kimi", "gqa")


def family_recipe(name, overrides=()):
    return load_recipe(["configs/tiny.yaml", f"configs/{name}.yaml"], overrides)


def trained(prepared, recipe, folder):
    """Train a step of each stage, and at least two, on the small corpus. Return the checkpoint."""
    stages = recipe.to_dict()["train"]["stages"]
    stages = [{**stage, "steps": 1 if len(stages) > 1 else 2} for stage in stages]
    recipe = recipe.model_copy(update={"data": prepared.data, "run": prepared.run})
    recipe = with_overrides(
        recipe,
        {"train.stages": stages, "train.workers": 1, "train.batch_rows": 4, "train.validation_rows": 4,
         "train.warmup_steps": 1, "train.log_every": 1},
    )  # fmt: skip
    record = Record()
    trainer = trainer_for(recipe, record)
    trainer.run()
    folder.mkdir()
    trainer.snapshot().write(folder)
    return folder, record


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_has_the_steps_rows_and_optimizer_of_the_demo(name):
    demo, recipe = load_recipe(["configs/tiny.yaml"]), family_recipe(name)
    assert recipe.run.name == name and recipe.model == type(recipe.model).from_preset(f"tiny-{name}")
    assert recipe.data == demo.data and recipe.train.optimizer == demo.train.optimizer
    assert total_steps(recipe) == total_steps(demo) and recipe.train.batch_rows == demo.train.batch_rows
    warms_up = [stage.attention for stage in recipe.train.stages].count("indexer_warmup")
    assert warms_up == (1 if recipe.model.indexed_layers else 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_trains_evaluates_and_is_exported(prepared, name, tmp_path, capsys):
    recipe = family_recipe(name)
    folder, record = trained(prepared, recipe, tmp_path / "final")
    assert record.reported[-1][1]["validation/loss"] > 0
    scores = evaluate(
        folder, ["mqar"], lengths=[96], samples=1, settings={"mqar": {"pairs": 3}}, data_folder=prepared.data_folder
    )
    assert 0 <= scores["eval/mqar/96/recall"] <= 1
    original, target = checkpoint.load(folder), tmp_path / "transformers"
    if name in ("mamba2", "gqa"):  # transformers has no network of these mixers with these experts
        with pytest.raises(ConfigError, match=r"^--from: (ffn|layers): .*"):
            export.run(recipe, folder, target)
        assert not target.exists()
        return
    export.run(recipe, folder, target)
    formats = {
        "v32": "kv_format fp8_128, rope_format bf16, index_format fp8_128",
        "kimi": "kv_format bf16, rope_format bf16",
    }
    assert f"differ slightly from those here ({formats[name]})" in capsys.readouterr().out
    again = import_pretrained(target)
    # config.json has no key for the initialization of the last projections.
    assert again.config == original.config.replace(zero_init_output=False)
    for key, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_mamba2_without_experts_is_exported(prepared, tmp_path):
    recipe = family_recipe("mamba2", ["model.ffn=none"])
    folder, _ = trained(prepared, recipe, tmp_path / "final")
    export.run(recipe, folder, tmp_path / "transformers")
    again, original = import_pretrained(tmp_path / "transformers"), checkpoint.load(folder)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in original.state_dict().items())


def test_every_tiny_preset_has_a_recipe():
    assert {name for name in PRESETS if name.startswith("tiny-")} == {f"tiny-{name}" for name in FAMILIES}
