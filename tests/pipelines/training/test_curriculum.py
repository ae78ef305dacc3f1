"""Checks of the curriculum."""

import math

import pytest
from plain_training import (
    EXACT,
)

from model.errors import ConfigError, DataError
from pipelines.data.local_reader import local_rows
from pipelines.data.manifest import read_manifest
from pipelines.recipe.loading import with_overrides
from pipelines.training.curriculum import check_fills_batch, curriculum, tokens_after, total_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.index_topk": 24}, r"^model.index_topk: 24 is not below the 24 .* so the sparse train.stages.2"),
        ({"data.sequence_length": 300}, r"^data.sequence_length: 300 exceeds model.max_positions 256"),
        ({"train.workers": 3}, "^train.batch_rows: 8 rows do not divide over 3 workers and 1 accumulation step$"),
        ({"train.accumulation_steps": 3}, "8 rows do not divide over 1 worker and 3 accumulation steps$"),
        ({"train.stages": [{"tokens": 700}]}, r"train.stages.0.tokens: fewer than the 768 tokens of a single step"),
        ({"train.stages": [{"steps": 1, "index_topk": 24}]}, "^train.stages.0.index_topk: 24 is not below the 24"),
        ({"train.stages": [{"steps": 1, "sequence_length": 16}]}, "not below the 4 entries of a 16-token sequence"),
        (
            {"model.layers": ["sliding"], "train.stages": [{"attention": "dense", "steps": 1, "index_topk": 3}]},
            r"train.stages.0.index_topk: 3 is set, but no layer of model.layers has an indexer",
        ),
        ({"model.hca_ratio": 128}, "128 tokens per entry leave a 96-token sequence without any entry"),
        ({"train.indexer_loss_weight": 0}, "leaves the indexer untrained"),
        ({"train.mtp_loss_weight": 0, "model.mtp_layers": 1}, "leaves the model's multi-token prediction untrained"),
        ({"model.layers": ["sliding"]}, "no layer of model.layers has an indexer"),
        (
            {**EXACT, "model.qat": True, "model.ffn": "dense"},
            r"model.qat: quantization-aware training is on, but quantizes no tensor",
        ),
    ],
)
def test_a_stage_that_cannot_act_is_refused(prepared, changes, message):
    with pytest.raises(ConfigError, match=message):
        curriculum(with_overrides(prepared, changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.stages": [{}]}, r"train.stages.0: expected either steps or tokens, found neither$"),
        ({"train.stages": [{"steps": 3, "tokens": 3000}]}, r"0: expected either steps or tokens, found both$"),
        ({"train.stages": [{"steps": 0}]}, r"train.stages.0.steps: .* at least 1, found 0"),
        ({"train.stages": []}, "train.stages: must not be empty"),
        (
            {"train.stages": [{"steps": 1, "learning_rate_scale": 0}]},
            r"train.stages.0.learning_rate_scale: .* above 0, found 0",
        ),
        (
            {"train.stages": [{"steps": 1, "learning_rate_scale": math.inf}]},
            r"train.stages.0.learning_rate_scale: expected a finite number, found .inf",
        ),
        (
            {"train.optimizer.learning_rate": 0},
            "learning_rate: expected a finite number above 0, found 0",
        ),
        (
            {"train.optimizer.learning_rate": math.inf},
            "learning_rate: expected a finite number above 0, found .inf",
        ),
        (
            {"train.optimizer.weight_decay": math.nan},
            "weight_decay: expected a finite number of at least 0, found .nan",
        ),
    ],
)
def test_a_stage_without_a_step_or_a_rate_is_refused(prepared, changes, named):
    with pytest.raises(ConfigError, match=named):
        with_overrides(prepared, changes)


def test_data_that_fill_no_batch_are_refused_before_any_compute(prepared):
    manifest = read_manifest(prepared.data_folder)
    there = sum(1 for _ in local_rows(prepared.data_folder, "train", 96))
    stages = [{"steps": 1, "batch_rows": rows} for rows in (there, there + 1)]
    check_fills_batch(with_overrides(prepared, {"train.stages": stages[:1]}), manifest)
    with pytest.raises(
        DataError, match=rf"fill {there} rows of 96, fewer than the {there + 1} of one batch of train\.stages\.1$"
    ):
        check_fills_batch(with_overrides(prepared, {"train.stages": stages}), manifest)


def test_tokens_are_counted_over_the_stages(prepared):
    stages = [{"steps": 3, "batch_rows": 2}, {"steps": 2, "batch_rows": 4, "sequence_length": 48}]
    recipe = with_overrides(prepared, {"train.stages": stages})
    counted = [tokens_after(curriculum(recipe), step) for step in range(6)]
    assert counted == [0, 192, 384, 576, 768, 960] and total_tokens(recipe) == 960
