"""Held-out metrics of a network in training."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.distributed.dtensor import is_sharded
from model.distributed.fsdp import reshard_all
from model.forward.aux_outputs import AuxOutputs
from model.forward.context import AttentionMode
from model.transformer import Transformer
from pipelines.data.batches import Batch, stack_rows
from pipelines.data.local_reader import local_rows
from pipelines.data.manifest import KINDS, Kind, read_manifest
from pipelines.data.packing import TargetKind
from pipelines.recipe.metrics import LOSS
from pipelines.recipe.schema import Recipe
from pipelines.training.collectives import max_over_ranks, sum_over_ranks

_COUNTS = ("loss", "tokens", "mtp_loss", "mtp_tokens", "right", "answers", "queries", "choosing")
_SELECTION = ("indexer_kl", "recall_at_k", "recall_at_k_of_best")


def metric_names(config: ModelConfig, kinds: Collection[Kind], length: int) -> list[str]:
    """Return the names of the metrics of :func:`validate` for rows of ``kinds`` with ``length`` tokens."""
    names = ["loss"]
    for kind in KINDS:
        if kind in kinds:
            names += ["text_loss"] if kind == "text" else [_of_kind(kind, "answer_loss"), _of_kind(kind, "recall")]
    if config.mtp_layers:
        names.append("mtp_loss")
    layers = config.indexed_layers
    choosing = [layer for layer, ratio in config.indexer_ratios.items() if length // ratio > config.index_topk]
    for name, measured in zip(_SELECTION, (layers, choosing, choosing), strict=True):
        if measured:
            names += [name, *(f"{name}/layer_{layer}" for layer in measured)]
    if layers:
        names.append("choosing_share")
    return [f"validation/{name}" for name in names]


def _of_kind(kind: Kind, name: str) -> str:
    """Return the name of a metric of retrieval documents."""
    return name if kind == "mqar" else f"{kind}_{name}"


def held_out_batches(recipe: Recipe, rank: int = 0, world: int = 1) -> dict[str, list[Batch]]:
    """Return this rank's share of ``train.validation_rows`` held-out rows of each kind, in batches by kind."""
    folder, train = recipe.data_folder, recipe.train
    size = max(1, train.batch_rows // world)
    stored = read_manifest(folder).splits["validation"].rows
    found: dict[str, list[Batch]] = {}
    for kind in KINDS:
        if stored.get(kind):
            rows = local_rows(folder, "validation", recipe.data.sequence_length, [kind], train.validation_rows)
            found[kind] = list(stack_rows(list(rows)[rank::world], size))
    return found


@torch.no_grad()
def validate(model: Transformer, batches: dict[str, list[Batch]], attention: AttentionMode) -> dict[str, float]:
    """Return held-out metrics over all ranks' ``batches`` by kind (``KINDS``).

    * ``validation/text_loss``: mean loss of text tokens.
    * ``validation/recall`` of mqar documents and ``validation/<kind>_recall`` of others: share of answers whose every
      token is the most likely one, teacher-forced.
    * ``validation/loss``: mean loss of text and answer tokens, with equal weight for each kind of document;
      ``validation/mtp_loss`` likewise for multi-token prediction.
    * ``validation/choosing_share``: share of queries with more entries than ``index_topk``, over layers with an
      indexer. Where it is 0, nothing is selected.

    Indexer and selection metrics are measured on key-value documents, or on the first kind if there are none. They are
    means over layers with an indexer, and over the batches that have them, and are repeated per layer
    (``.../layer_2``).
    """
    reshard_all(model)
    selection_kind = "mqar" if "mqar" in batches else next(iter(batches))
    training = model.training
    model.eval()
    config, metrics, losses, mtp_losses = model.config, {}, [], []
    for name, of_kind in batches.items():
        sums = _sum_metrics(model, of_kind, TargetKind.TEXT if name == "text" else TargetKind.ANSWER, attention)
        losses.append(sums["loss"] / max(1, sums["tokens"]))
        mtp_losses.append(sums["mtp_loss"] / max(1, sums["mtp_tokens"]))
        if name == "text":
            metrics["validation/text_loss"] = losses[-1]
        else:
            metrics[f"validation/{_of_kind(name, 'answer_loss')}"] = losses[-1]
            metrics[f"validation/{_of_kind(name, 'recall')}"] = sums["right"] / max(1, sums["answers"])
        if name == selection_kind:
            for key in _selection_keys(model):
                if sums[f"{key} batches"]:
                    metrics[f"validation/{key}"] = sums[key] / sums[f"{key} batches"]
            if config.indexed_layers:
                metrics["validation/choosing_share"] = sums["choosing"] / max(1, sums["queries"])
    for layer in model.moe_layers():
        layer.drop_rounded()  # the weights are about to change
    metrics[LOSS] = sum(losses) / len(losses)
    if config.mtp_layers:
        metrics["validation/mtp_loss"] = sum(mtp_losses) / len(mtp_losses)
    model.train(training)
    return metrics


def _selection_keys(model: Transformer) -> list[str]:
    layers = model.config.indexed_layers
    return [key for name in _SELECTION for key in (name, *(f"{name}/layer_{layer}" for layer in layers))]


def _sum_metrics(
    model: Transformer, batches: list[Batch], target_kind: TargetKind, attention: AttentionMode
) -> dict[str, float]:
    """Return numerators and denominators of one kind's metrics, summed over its batches and all ranks."""
    device, config = model.embed.weight.device, model.config
    # Sums over ranks are matched by index, so every rank needs all keys, even without batches.
    selection = _selection_keys(model)
    sums = dict.fromkeys((*_COUNTS, *selection, *(f"{key} batches" for key in selection)), 0.0)
    # FSDP gathers layers collectively, so a rank with fewer batches must run as many forward passes.
    missing = max_over_ranks(len(batches), device) - len(batches) if any(map(is_sharded, model.parameters())) else 0
    for _ in range(missing):
        aux = AuxOutputs(predict_ahead=bool(config.mtp_layers))
        model(torch.zeros((1, 2), dtype=torch.int64, device=device), attention=attention, aux=aux)
    for batch in batches:
        aux = AuxOutputs(measure_selection=True, predict_ahead=bool(config.mtp_layers))
        tokens, kinds, positions = (batch[name].to(device) for name in ("tokens", "target_kind", "positions"))
        logits = model(tokens[:, :-1], positions=positions, attention=attention, aux=aux)
        counted = kinds == target_kind
        loss = F.cross_entropy(logits[counted], tokens[:, 1:][counted], reduction="sum")
        found = {"loss": float(loss), "tokens": int(counted.sum())}
        if aux.mtp_logits is not None:
            mtp_counted = counted[:, 1:] & continues_document(positions)
            loss = F.cross_entropy(aux.mtp_logits[mtp_counted], tokens[:, 2:][mtp_counted], reduction="sum")
            found |= {"mtp_loss": float(loss), "mtp_tokens": int(mtp_counted.sum())}
        if target_kind == TargetKind.ANSWER:
            found["right"], found["answers"] = count_answers(logits.argmax(-1) == tokens[:, 1:], counted)
        for key, value in aux.by_layer(_SELECTION).items():
            found |= {key: value, f"{key} batches": 1}
        # Per layer with an indexer: their entries may differ in size.
        ratios = config.indexer_ratios.values()
        found["queries"] = len(ratios) * int((positions >= 0).sum())
        found["choosing"] = sum(int(((positions + 1) // ratio > config.index_topk).sum()) for ratio in ratios)
        for key, value in found.items():
            sums[key] += value
    total = sum_over_ranks(torch.tensor(list(sums.values()), dtype=torch.float64, device=device)).tolist()
    return dict(zip(sums, total))


def continues_document(positions: Tensor) -> Tensor:
    """Return whether each token after a row's first continues the document of the token before: bool [B, S - 1].

    ``positions`` int64 [B, S]. Only there does the target of multi-token prediction belong to the same document.
    """
    return positions[:, 1:] > 0


def count_answers(right: Tensor, answer: Tensor) -> tuple[int, int]:
    """Return (answers right in every token, answers). An answer is a run of adjacent answer tokens.

    Args:
        right: Whether each prediction is right, bool [B, L].
        answer: Whether each token belongs to an answer, bool [B, L].
    """
    starts = answer & ~F.pad(answer, (1, 0))[:, :-1]
    run = starts.flatten().cumsum(0)[answer.flatten()] - 1
    total = int(starts.sum())
    wrong = torch.zeros(total, dtype=torch.int64, device=run.device)
    wrong.index_add_(0, run, (~right).flatten()[answer.flatten()].long())
    return int((wrong == 0).sum()), total
