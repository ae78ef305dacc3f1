"""Clusters that cannot run a step."""

import socket

import pytest
import torch

from model.errors import ConfigError, FiftyfoldError
from pipelines.ray_runtime.session import ray_session
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


@pytest.mark.parametrize("step", [train, sweep, ablate, compare, demo])
def test_an_address_without_a_cluster_is_named_before_anything_starts(tmp_path, monkeypatch, capsys, step):
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free}")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    recipe = recipe_from_dict({"run": {"folder": str(tmp_path / "runs")}})
    with pytest.raises(FiftyfoldError, match=rf"^RAY_ADDRESS: no Ray cluster answers at 127\.0\.0\.1:{free} \("):
        step.run(recipe)
    assert not (tmp_path / "runs").exists() and not capsys.readouterr().out


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "ray://[::1]:1", "nobody.invalid:6379"])
def test_a_session_waits_for_no_address_that_cannot_answer(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was asked"))
    with pytest.raises(FiftyfoldError, match=r"^RAY_ADDRESS: no Ray cluster answers at"), ray_session():
        pass
