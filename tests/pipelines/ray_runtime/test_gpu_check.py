"""Recipes with GPUs on machines without any."""

import pytest
import torch

from model.errors import ConfigError
from pipelines.recipe.loading import recipe_from_dict
from pipelines.steps import ablate, compare, demo, sweep, train


@pytest.mark.parametrize("step", [train, sweep, ablate, compare, demo])
def test_a_missing_gpu_is_named_before_anything_starts(tmp_path, monkeypatch, capsys, step):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = recipe_from_dict({"run": {"folder": str(tmp_path / "runs")}, "train": {"use_gpu": True}})
    with pytest.raises(ConfigError, match=r"^train\.use_gpu: no CUDA device here"):
        step.run(recipe)
    assert not (tmp_path / "runs").exists() and not capsys.readouterr().out
