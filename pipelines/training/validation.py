"""Held-out metrics of a network in training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.mixers.base import AttentionMode
from model.sharding import is_sharded, settle
from model.telemetry import Telemetry
from model.transformer import Transformer
from pipelines.data.packing import Batch, TargetKind
from pipelines.training.collectives import max_over_ranks, sum_over_ranks

NAMES = (
    *("loss", "text_loss", "answer_loss", "recall", "needle_answer_loss", "needle_recall", "mtp_loss"),
    *("indexer_kl", "recall_at_k", "recall_at_k_of_best", "choosing_share"),
)
"""What :func:`validate` can measure, without ``validation/``."""
_COUNTS = ("loss", "tokens", "mtp_loss", "mtp_tokens", "right", "answers", "queries", "choosing")
_SELECTION = ("indexer_kl", "recall_at_k", "recall_at_k_of_best")


@torch.no_grad()
def validate(model: Transformer, batches: dict[str, list[Batch]], attention: AttentionMode) -> dict[str, float]:
    """Held-out metrics over all ranks' ``batches`` by kind ("text", "mqar", "needle").

    ``validation/text_loss``: mean loss of text tokens. ``validation/recall``: share of key-value answers whose
    every token is the most likely one (teacher-forced); ``validation/needle_recall`` likewise. ``validation/loss``:
    mean loss of text and answer tokens, each kind of document weighing the same; ``validation/mtp_loss`` the same
    for the multi-token prediction of those tokens. Indexer and selection measures are taken on key-value documents,
    on the first kind where there are none: means over csa layers, and over the batches that have them, and once more
    for each layer (``.../layer_2``); ``validation/choosing_share`` is the share of queries with more entries than
    ``index_topk``: where it is 0, nothing is selected.
    """
    settle(model)
    selecting = "mqar" if "mqar" in batches else next(iter(batches))
    training = model.training
    model.eval()
    config, metrics, losses, mtp_losses = model.config, {}, [], []
    for name, of_kind in batches.items():
        sums = _sums(model, of_kind, TargetKind.TEXT if name == "text" else TargetKind.ANSWER, attention)
        losses.append(sums["loss"] / max(1, sums["tokens"]))
        mtp_losses.append(sums["mtp_loss"] / max(1, sums["mtp_tokens"]))
        if name == "text":
            metrics["validation/text_loss"] = losses[-1]
        else:
            prefix = "" if name == "mqar" else f"{name}_"
            metrics[f"validation/{prefix}answer_loss"] = losses[-1]
            metrics[f"validation/{prefix}recall"] = sums["right"] / max(1, sums["answers"])
        if name == selecting:
            for key in _selection_keys(model):
                if sums[f"{key} batches"]:
                    metrics[f"validation/{key}"] = sums[key] / sums[f"{key} batches"]
            if "csa" in config.layers:
                metrics["validation/choosing_share"] = sums["choosing"] / max(1, sums["queries"])
    for layer in model.moe_layers():
        layer.forget_rounded()  # of weights that are about to change
    metrics["validation/loss"] = sum(losses) / len(losses)
    if config.mtp_layers:
        metrics["validation/mtp_loss"] = sum(mtp_losses) / len(mtp_losses)
    model.train(training)
    return metrics


def _selection_keys(model: Transformer) -> list[str]:
    layers = [layer for layer, name in enumerate(model.config.layers) if name == "csa"]
    return [key for name in _SELECTION for key in (name, *(f"{name}/layer_{layer}" for layer in layers))]


def _sums(model: Transformer, batches: list[Batch], counted: TargetKind, attention: AttentionMode) -> dict[str, float]:
    """What the metrics of one kind are made of, summed over its batches and all ranks."""
    device, config = model.embed.weight.device, model.config
    # The same keys on every rank, also on one that got no batch: they are summed over ranks by place.
    selection = _selection_keys(model)
    sums = dict.fromkeys((*_COUNTS, *selection, *(f"{key} batches" for key in selection)), 0.0)
    # Ranks gather a sharded network's layers together, so one with fewer batches must make as many passes.
    more = max_over_ranks(len(batches), device) - len(batches) if any(map(is_sharded, model.parameters())) else 0
    for _ in range(more):
        telemetry = Telemetry(predict_ahead=bool(config.mtp_layers))
        model(torch.zeros((1, 2), dtype=torch.int64, device=device), attention=attention, telemetry=telemetry)
    for batch in batches:
        telemetry = Telemetry(measure_selection=True, predict_ahead=bool(config.mtp_layers))
        tokens, kinds, positions = (batch[name].to(device) for name in ("tokens", "target_kind", "positions"))
        logits = model(tokens[:, :-1], positions=positions, attention=attention, telemetry=telemetry)
        chosen = kinds == counted
        each = F.cross_entropy(logits[chosen], tokens[:, 1:][chosen], reduction="sum")
        found = {"loss": float(each), "tokens": int(chosen.sum())}
        if telemetry.mtp_logits is not None:
            ahead = chosen[:, 1:] & follows(positions)
            each = F.cross_entropy(telemetry.mtp_logits[ahead], tokens[:, 2:][ahead], reduction="sum")
            found |= {"mtp_loss": float(each), "mtp_tokens": int(ahead.sum())}
        if counted == TargetKind.ANSWER:
            found["right"], found["answers"] = count_answers(logits.argmax(-1) == tokens[:, 1:], chosen)
        for key, value in telemetry.by_layer(_SELECTION).items():
            found |= {key: value, f"{key} batches": 1}
        found["queries"] = int((positions >= 0).sum())
        found["choosing"] = int(((positions + 1) // config.csa_ratio > config.index_topk).sum())
        for key, value in found.items():
            sums[key] += value
    whole = sum_over_ranks(torch.tensor(list(sums.values()), dtype=torch.float64, device=device)).tolist()
    return dict(zip(sums, whole))


def follows(positions: Tensor) -> Tensor:
    """Whether each token after a row's first goes on with the document of the one before: bool [B, S - 1].

    ``positions`` int64 [B, S]. Only there is the token after next, the target of what follows, of the same document.
    """
    return positions[:, 1:] > 0


def count_answers(right: Tensor, answer: Tensor) -> tuple[int, int]:
    """(answers right in every token, answers) from bool masks [B, L]; an answer is a run of adjacent answer tokens."""
    starts = answer & ~F.pad(answer, (1, 0))[:, :-1]
    run = starts.flatten().cumsum(0)[answer.flatten()] - 1
    total = int(starts.sum())
    wrong = torch.zeros(total, dtype=torch.int64, device=run.device)
    wrong.index_add_(0, run, (~right).flatten()[answer.flatten()].long())
    return int((wrong == 0).sum()), total
