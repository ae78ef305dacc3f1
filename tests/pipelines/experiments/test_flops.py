"""FLOPs of a training."""

import pytest

from model.costs import decode_work
from pipelines.experiments.flops import training_flops
from pipelines.recipe.loading import with_overrides


def stages(*each, **changes):
    return {"train.stages": [{"steps": 2, **stage} for stage in each], "train.optimizer.rule": "adamw", **changes}


def test_a_training_costs_three_forward_passes_over_every_position(prepared):
    recipe = with_overrides(prepared, stages({"attention": "sparse", "sequence_length": 24, "batch_rows": 3}))
    forward = sum(part.flops for n in range(1, 25) for part in decode_work(recipe.model, n))
    assert training_flops(recipe) == pytest.approx(2 * 3 * 3 * forward)


def test_dense_stages_attend_to_all_entries_and_do_not_index(prepared):
    recipe = with_overrides(prepared, stages({"attention": "dense"}))
    wide = recipe.model.replace(index_topk=96)
    forward = sum(part.flops for n in range(1, 97) for part in decode_work(wide, n) if part.kind != "index")
    assert training_flops(recipe) == pytest.approx(2 * 8 * 3 * forward)


def test_a_warm_up_has_a_backward_pass_of_the_indexers_only(prepared):
    dense, warm_up = (
        training_flops(with_overrides(prepared, stages({"attention": attention})))
        for attention in ("dense", "indexer_warmup")
    )
    assert dense / 3 < warm_up < dense


def test_muon_costs_its_orthogonalization(prepared):
    plain = with_overrides(prepared, stages({"attention": "dense"}))
    muon = with_overrides(plain, {"train.optimizer.rule": "muon"})
    twice = with_overrides(muon, {"train.stages": [{"attention": "dense", "steps": 4}]})
    assert training_flops(muon) > training_flops(plain)
    assert training_flops(twice) == 2 * training_flops(muon)
