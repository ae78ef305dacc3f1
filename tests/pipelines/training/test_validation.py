"""Held-out metrics."""

import pytest
import torch
from plain_training import (
    EXACT,
    Record,
    packed_and_alone,
    trainer_for,
)

from pipelines.recipe.loading import with_overrides
from pipelines.training.validation import count_answers, metric_names


def test_validation_masks_documents_too(prepared):
    recipe = with_overrides(prepared, {"model.mtp_layers": 1, **EXACT})
    trainer = trainer_for(recipe, Record())
    measured = []
    for batch in packed_and_alone(recipe.data.sequence_length):
        trainer._validation = {"text": [batch], "mqar": [batch]}
        measured.append(trainer.validate())
    assert measured[0]["validation/recall"] == measured[1]["validation/recall"]
    for name in ("text_loss", "answer_loss", "loss", "mtp_loss"):
        assert measured[0][f"validation/{name}"] == pytest.approx(measured[1][f"validation/{name}"], rel=1e-5), name


def test_selection_is_measured_where_there_is_a_choice(prepared):
    """Batches without a choice do not dilute the metric, but count in choosing_share."""
    recipe = with_overrides(prepared, {"train.stages": [{"attention": "sparse", "steps": 1}]})
    trainer = trainer_for(recipe, Record())
    (whole, *_) = trainer._validation["mqar"]
    short = {**whole, "positions": torch.arange(whole["positions"].shape[1]).expand_as(whole["positions"]) % 3}
    trainer._validation = {"mqar": [whole]}
    expected = trainer.validate()
    trainer._validation = {"mqar": [whole, short]}
    found = trainer.validate()
    assert found["validation/recall_at_k"] == pytest.approx(expected["validation/recall_at_k"])
    assert found["validation/choosing_share"] == pytest.approx(expected["validation/choosing_share"] / 2)
    trainer._validation = {"mqar": [short]}
    none = trainer.validate()
    assert none["validation/choosing_share"] == 0 and "validation/recall_at_k" not in none


@pytest.mark.parametrize("changes", [{}, {"model.mtp_layers": 1, "model.layers": ["csa", "hca", "csa"]}])
def test_the_names_of_the_metrics_are_known_before_a_training(prepared, changes):
    recipe = with_overrides(prepared, {"train.stages": [{"attention": "sparse", "steps": 1}], **changes})
    trainer = trainer_for(recipe, Record())
    for kinds in (["text", "mqar", "needle"], ["text"]):
        trainer._validation = {kind: batches for kind, batches in trainer._validation.items() if kind in kinds}
        names = metric_names(trainer.model.config, kinds, recipe.data.sequence_length)
        assert {name for name in trainer.validate() if name.startswith("validation/")} == set(names)


def test_an_answer_counts_only_whole():
    answer = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 1, 0]], dtype=torch.bool)
    right = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]], dtype=torch.bool)
    assert count_answers(right, answer) == (2, 4)
