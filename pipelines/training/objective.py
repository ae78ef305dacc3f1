"""The training objective: weighted sum of language modeling, indexer, load-balancing and multi-token losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.forward.aux_outputs import AuxOutputs
from pipelines.data.batches import Batch
from pipelines.data.packing import TargetKind
from pipelines.recipe.schema import TrainSection
from pipelines.training.collectives import sum_over_ranks, world_size
from pipelines.training.curriculum import Stage
from pipelines.training.validation import continues_document


@dataclass(frozen=True)
class Denominators:
    """Denominators of the mean losses of one batch, over all ranks. Scalars, except ``rows``."""

    rows: int
    """Rows of this rank."""
    weight: Tensor
    """Sum of the target weights."""
    mtp_weight: Tensor
    """Sum of the weights of multi-token targets."""
    scored: dict[int, Tensor]
    """Tokens with at least one entry for an indexer to score, by the indexer's tokens per entry."""


def denominators(weights: Tensor, positions: Tensor, indexer_ratios: Iterable[int]) -> Denominators:
    """Sum over all ranks. ``weights`` float32 [B, S], ``positions`` int64 [B, S]. Every rank must call it."""
    mtp_weights = weights[:, 1:] * continues_document(positions)
    ratios = sorted(set(indexer_ratios))
    scored = [(positions >= ratio - 1).float().sum() for ratio in ratios]
    sums = sum_over_ranks(torch.stack([weights.sum(), mtp_weights.sum(), *scored])).clamp(min=1.0)
    return Denominators(len(weights), sums[0], sums[1], dict(zip(ratios, sums[2:])))


def combine_losses(
    batch: Batch,
    weights: Tensor,
    totals: Denominators,
    logits: Tensor,
    aux: AuxOutputs,
    stage: Stage,
    train: TrainSection,
    mtp_loss_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the scalar to differentiate for a microbatch, and its detached losses by metric name.

    Gradients summed over microbatches and averaged over ranks are those of the whole batch's mean losses. Losses
    summed over microbatches and averaged over ranks are these means.

    Args:
        weights: Weight of each target, float32 [B, S].
        totals: Denominators of the whole batch.
        logits: float32 [B, S, V].
        aux: Auxiliary outputs of the forward pass.
    """
    tokens, positions = batch["tokens"], batch["positions"]
    losses = {"train/loss": weighted_loss(logits, tokens[:, 1:], weights, totals.weight)}
    objective = losses["train/loss"] if not stage.warms_up else logits.new_zeros(())
    if stage.model.indexed_layers:
        kl = _indexer_loss(positions, totals, aux, stage.model.indexer_ratios, logits.new_zeros(()))
        losses["train/indexer_kl"] = kl
        objective = objective + train.indexer_loss_weight * kl
    balance = aux.loss("balance")
    if balance is not None:
        losses["train/balance"] = balance * len(tokens) / totals.rows
        if not stage.warms_up:
            objective = objective + train.balance_loss_weight * losses["train/balance"]
    if aux.mtp_logits is not None:
        mtp_weights = weights[:, 1:] * continues_document(positions)
        losses["train/mtp_loss"] = weighted_loss(aux.mtp_logits, tokens[:, 2:], mtp_weights, totals.mtp_weight)
        objective = objective + mtp_loss_weight * losses["train/mtp_loss"]
    return objective, {name: loss.detach() for name, loss in losses.items()}


def _indexer_loss(
    positions: Tensor, totals: Denominators, aux: AuxOutputs, ratios: dict[int, int], zero: Tensor
) -> Tensor:
    """Return the indexers' mean divergence over layers and over tokens with an entry to score.

    The number of such tokens differs between ranks. A rank that holds only short documents has no divergence to
    report, but must still take part in the sum.
    """
    divergences = aux.losses.get("indexer_kl", {})
    loss = zero
    for ratio, total in totals.scored.items():
        layers = [layer for layer, own in ratios.items() if own == ratio]
        found = [divergences[layer] for layer in layers if layer in divergences]
        if found:
            scored = (positions >= ratio - 1).sum()
            mean = sum(found[1:], found[0]) / len(found)
            loss = loss + len(layers) / len(ratios) * (scored * world_size() / total * mean)
    return loss


def target_weights(kinds: Tensor, answer: float, context: float) -> Tensor:
    """Return the loss weight of each target as float32, for ``kinds`` uint8 [B, L] of
    :class:`pipelines.data.packing.TargetKind`."""
    weights = (kinds != TargetKind.PADDING).float()
    weights = torch.where(kinds == TargetKind.ANSWER, answer, weights)
    return torch.where(kinds == TargetKind.CONTEXT, context, weights)


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """Return the weighted cross entropy, scaled so that its average over ranks is the mean over the whole batch.

    Args:
        logits: float32 [B, S, V].
        targets: int64 [B, S].
        weights: float32 [B, S].
        total: Weight of the whole batch on all ranks.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
    return (losses * weights).sum() / total * world_size()
