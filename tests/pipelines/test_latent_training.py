"""Training of mla and dsa layers by the trainer: curriculum, exact resume and sharding."""

import json

import pytest
import torch
from gloo import on_ranks
from sharded_ranks import latent_ranks, trained

from model import checkpoint
from model.errors import ConfigError
from pipelines.recipe.loading import with_overrides
from pipelines.training.curriculum import curriculum

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}


@pytest.fixture(scope="module")
def recipe(prepared):
    return with_overrides(
        prepared,
        {"model.layers": ["dsa", "mla", "csa"], "model.mixer_options": {"dsa": LATENT, "mla": LATENT},
         "train.stages": [{"attention": "dense", "steps": 1}, {"attention": "indexer_warmup", "steps": 1},
                          {"attention": "sparse", "steps": 2}],
         "train.checkpoint_every": 1, "train.validate_every": 4, "train.recompute": True},
    )  # fmt: skip


def record(folder):
    return json.loads((folder / "record.json").read_text())


def assert_equal_weights(found, expected):
    found, expected = (checkpoint.load(folder).state_dict() for folder in (found, expected))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_resumed_run_is_bit_identical_and_warm_up_changes_only_indexers(recipe, tmp_path):
    trained(recipe, tmp_path / "straight")
    trained(recipe, tmp_path / "resumed", source=tmp_path / "straight" / "2")
    assert_equal_weights(tmp_path / "resumed" / "4", tmp_path / "straight" / "4")
    logged = {step: metrics for step, metrics in record(tmp_path / "straight")[0]}
    assert {step: metrics for step, metrics in record(tmp_path / "resumed")[0]} == {n: logged[n] for n in (3, 4)}
    assert all("train/indexer_kl" in metrics for metrics in logged.values())
    before, after = (checkpoint.load(tmp_path / "straight" / step).state_dict() for step in "12")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".indexer." in name}
    validated = record(tmp_path / "straight")[1][-1][1]
    for layer in (0, 2):
        assert validated[f"validation/recall_at_k/layer_{layer}"] <= 1
    # Of 96 positions with 4 selected: tokens from the 5th on, and from the 20th on in csa with 4 tokens per entry.
    assert 0.5 < validated["validation/choosing_share"] < 1


def test_sharded_training_is_bit_identical_to_replicated_training(recipe, tmp_path):
    on_ranks(2, latent_ranks, recipe.to_dict(), tmp_path)
    shards, replicas = (dict(map(tuple, record(tmp_path / kind)[0])) for kind in ("shards", "replicas"))
    for metrics, others in zip(shards.values(), replicas.values(), strict=True):
        assert metrics.pop("train/grad_norm") == pytest.approx(others.pop("train/grad_norm"), rel=1e-5)
    assert shards == replicas and len(shards) == 4
    assert_equal_weights(tmp_path / "shards" / "4", tmp_path / "replicas" / "4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.layers": ["dsa"], "model.index_topk": 96},
            "index_topk: 96 is not below the 96 entries of a 96-token sequence",
        ),
        ({"model.index_topk": 24}, "index_topk: 24 is not below the 24 entries"),
        ({"model.layers": ["mla"]}, "indexer_warmup is set, but no layer of model.layers has an indexer"),
    ],
)
def test_stages_without_effect_are_refused(recipe, changes, message):
    assert len(curriculum(with_overrides(recipe, {"model.layers": ["dsa"], "model.index_topk": 95}))) == 3
    with pytest.raises(ConfigError, match=message):
        curriculum(with_overrides(recipe, changes))
