"""The training objective of layers whose indexers score entries of different sizes."""

import pytest
import torch

from model.config import ModelConfig
from model.forward.aux_outputs import AuxOutputs
from pipelines.recipe.schema import TrainSection
from pipelines.training.curriculum import Stage
from pipelines.training.objective import combine_losses, denominators
from tests.model.networks import SMALL

STAGE = Stage(
    index=0,
    first_step=0,
    steps=1,
    attention="indexer_warmup",
    sequence_length=6,
    batch_rows=2,
    model=ModelConfig(**{**SMALL, "layers": ("dsa", "csa", "dsa")}),
    learning_rate_scale=1.0,
    indexer_learning_rate=None,
)


def test_indexer_losses_of_microbatches_sum_to_the_mean_over_tokens_and_layers():
    # Of the first row's tokens 6 have a token to score and 3 an entry of 4 tokens; of the second's, 5 and none.
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, -1]])
    divergences = [{0: 1.0, 1: 2.0, 2: 3.0}, {0: 5.0, 2: 7.0}]
    weights = torch.ones(2, 6)
    totals = denominators(weights, positions, STAGE.model.indexer_ratios.values())
    assert {ratio: int(total) for ratio, total in totals.scored.items()} == {1: 11, 4: 3}
    found = 0.0
    for row, losses in enumerate(divergences):
        aux = AuxOutputs()
        aux.losses["indexer_kl"] = {layer: torch.tensor(loss) for layer, loss in losses.items()}
        batch = {"tokens": torch.zeros(1, 7, dtype=torch.int64), "positions": positions[row : row + 1]}
        logits = torch.zeros(1, 6, 5)
        _, parts = combine_losses(batch, weights[:1], totals, logits, aux, STAGE, TrainSection(), 0.0)
        found += float(parts["train/indexer_kl"])
    layers = [(6 * 1.0 + 5 * 5.0) / 11, (3 * 2.0) / 3, (6 * 3.0 + 5 * 7.0) / 11]
    assert found == pytest.approx(sum(layers) / 3)
