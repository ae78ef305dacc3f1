"""The training loop: plain torch, no Ray inside. Ray Train workers, Tune trials and tests all run this one.

Data-parallel ranks hold equal replicas: gradients are averaged after the backward pass, weighted by the tokens each
rank contributed, so that the update equals the one a single process would make of the whole batch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from model import checkpoint
from model.cache import Cache
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError, FiftyfoldError
from model.muon import MuonAdamW
from model.telemetry import Telemetry
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from pipelines.config import Recipe, StageSection
from pipelines.data import Batch, Kind, TargetKind, TrainBatches

OPTIMIZER, STATE = "optimizer.safetensors", "trainer.json"
CACHE = "cache/bytes_per_token"
CACHE_MEASURE_TOKENS = 65_536
_SUMS = ("loss", "tokens", "mtp_loss", "mtp_tokens", "right", "answers", "queries", "choosing")
_SELECTION = ("indexer_kl", "recall_at_k", "recall_at_k_of_best")


class Reporter(Protocol):
    """Where a training goes with what it learns about itself. Called on every rank, in step."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Cheap numbers of the step just done."""

    def report(self, step: int, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        """Validation metrics (empty when none was due); ``write`` puts a complete checkpoint into an existing folder
        (None: not due)."""


class Trainer:
    """Trains ``model`` through the recipe's stages.

    ``batches(epoch, skip)`` opens this rank's endless batches; ``validation`` are this rank's shares of the held-out
    batches by name ("text", "mqar", "needle"). Raises ConfigError, before any compute, for a stage that could not do
    what it says.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Transformer,
        batches: Callable[[int, int], TrainBatches],
        validation: dict[str, list[Batch]],
        reporter: Reporter,
        tokenizer: Tokenizer,
    ):
        check_stages(recipe)
        self.recipe, self.model, self.reporter, self.tokenizer = recipe, model, reporter, tokenizer
        self.device = next(model.parameters()).device
        self.optimizer = MuonAdamW(model.named_parameters(), recipe.train.optimizer)
        self.step = 0
        self._open_batches = batches
        self._position = (0, 0)
        self._validation = validation
        self._indexer = set(model.indexer_parameters())

    # --- checkpoints

    def write_checkpoint(self, folder: Path) -> None:
        """The model's checkpoint plus what resuming needs, into an existing folder."""
        checkpoint.write(self.model, folder, self.tokenizer)
        save_file({k: v.contiguous().cpu() for k, v in self.optimizer.state_tensors().items()}, folder / OPTIMIZER)
        state = {"step": self.step, "epoch": self._position[0], "batch": self._position[1]}
        (folder / STATE).write_text(json.dumps(state) + "\n")

    def load_checkpoint(self, folder: Path) -> None:
        """Go on from a folder written by :meth:`write_checkpoint`. Raises CheckpointError."""
        try:
            state = json.loads((folder / STATE).read_text())
            step, position = int(state["step"]), (int(state["epoch"]), int(state["batch"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / STATE}: not a training state ({error})") from error
        checkpoint.load_weights(self.model, folder)
        self.optimizer.load_state_tensors(checkpoint.read_tensors(folder / OPTIMIZER))
        self.step, self._position = step, position

    # --- training

    def run(self) -> dict[str, float]:
        """Train from the current step to the last. Returns the last validation's metrics (on every rank)."""
        train = self.recipe.train
        total = train.total_steps
        metrics: dict[str, float] = {}
        if self.step >= total:
            # No second checkpoint of this step: Ray Train would delete the first one, and the two share a folder.
            metrics = self.validate()
            self.reporter.report(self.step, metrics, None)
            return metrics
        batches = self._open_batches(*self._position)
        try:
            self.model.train()
            while self.step < total:
                started = time.perf_counter()
                batch = next(batches)
                update = self._update(batch, self.stage_at(self.step))
                self.step += 1
                self._position = (batches.epoch, batches.batch)
                if self.step % train.log_every == 0 or self.step == total:
                    seconds = time.perf_counter() - started
                    tokens = train.batch_rows * self.recipe.data.sequence_length
                    self.reporter.log(
                        self.step,
                        {
                            **{k: float(v) for k, v in update.items()},
                            "train/step_seconds": seconds,
                            "train/tokens_per_second": tokens / seconds,
                        },
                    )
                validate = self.step % train.validate_every == 0 or self.step == total
                save = self.step % train.checkpoint_every == 0 or self.step == total
                if validate:
                    metrics = self.validate()
                if validate or save:
                    self.reporter.report(
                        self.step, metrics if validate else {}, self.write_checkpoint if save else None
                    )
        finally:
            batches.close()
        return metrics

    def stage_at(self, step: int) -> StageSection:
        for stage in self.recipe.train.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.recipe.train.stages[-1]

    def _into_decay(self) -> float:
        """How much of the learning rate's fall is over at this step; not above 0 before it has begun."""
        train, total = self.recipe.train, self.recipe.train.total_steps
        decay_steps = max(1, round(total * train.decay_share))
        return (self.step - (total - decay_steps)) / decay_steps

    def _rate_scale(self) -> float:
        """Linear warm-up, constant, cosine to ``final_lr_share``; times the stage's own scale."""
        train, into_decay = self.recipe.train, self._into_decay()
        scale = min(1.0, (self.step + 1) / max(1, train.warmup_steps))
        if into_decay > 0:
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, into_decay)))
            scale *= train.final_lr_share + (1 - train.final_lr_share) * cosine
        return scale * self.stage_at(self.step).learning_rate_scale

    def _mtp_weight(self) -> float:
        train = self.recipe.train
        return train.mtp_decay_loss_weight if self._into_decay() > 0 else train.mtp_loss_weight

    def _update(self, batch: Batch, stage: StageSection) -> dict[str, Tensor | float]:
        """One optimizer step on one batch."""
        train = self.recipe.train
        tokens, kinds, positions = (batch[name].to(self.device) for name in ("tokens", "target_kind", "positions"))
        warmup = stage.attention == "indexer_warmup"
        telemetry = Telemetry(predict_ahead=bool(self.recipe.model.mtp_layers) and not warmup)
        attention = "sparse" if stage.attention == "sparse" else "dense"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=train.autocast == "bfloat16"):
            logits = self.model(tokens[:, :-1], positions=positions, attention=attention, telemetry=telemetry)
        weights = (kinds != TargetKind.PADDING).float()
        weights = torch.where(kinds == TargetKind.ANSWER, train.answer_loss_weight, weights)
        weights = torch.where(kinds == TargetKind.CONTEXT, train.context_loss_weight, weights)
        loss, mean_loss = weighted_loss(logits, tokens[:, 1:], weights)
        objective = loss if not warmup else loss.new_zeros(())
        kl, balance = telemetry.loss("indexer_kl"), telemetry.loss("balance")
        if "csa" in self.recipe.model.layers:
            # A mean over the tokens with an entry to score. Ranks hold different numbers of them, and one may hold
            # short documents only: it has no divergence to report and must still take part in the sum.
            scoring = (positions >= self.recipe.model.csa_ratio - 1).sum().float()
            share = scoring * world_size() / sum_over_ranks(scoring.clone()).clamp(min=1.0)
            kl = share * kl if kl is not None else share * 0.0
            objective = objective + train.indexer_loss_weight * kl
        if balance is not None and not warmup:
            objective = objective + train.balance_loss_weight * balance
        if telemetry.mtp_logits is not None:
            ahead = weights[:, 1:] * follows(positions)
            mtp_loss, mean_mtp_loss = weighted_loss(telemetry.mtp_logits, tokens[:, 2:], ahead)
            objective = objective + self._mtp_weight() * mtp_loss

        self.model.zero_grad(set_to_none=True)
        if objective.requires_grad:  # not in a warm-up on documents that are all too short for an entry
            objective.backward()
        learning = [p for p in self.model.parameters() if not warmup or p in self._indexer]
        average_gradients(learning)
        grad_norm = torch.nn.utils.clip_grad_norm_(learning, train.grad_clip)
        if not torch.isfinite(grad_norm):
            # Going on would write damaged weights over the last good checkpoints.
            raise FiftyfoldError(f"step {self.step + 1}: the gradient is not finite (loss {float(mean_loss):g})")
        self.optimizer.set_lr_scale(self._rate_scale())
        self.optimizer.step()
        self._balance_routers(0.0 if warmup else train.router_bias_speed)
        measured = {
            "train/loss": mean_loss,
            "train/grad_norm": grad_norm,
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        measured |= {f"train/learning_rate/{g['rule']}": g["lr"] for g in self.optimizer.param_groups}
        for name, part in (("indexer_kl", kl), ("balance", balance)):
            if part is not None:
                measured[f"train/{name}"] = sum_over_ranks(part.detach().clone()) / world_size()
        if telemetry.mtp_logits is not None:
            measured["train/mtp_loss"] = mean_mtp_loss
        return measured

    def _balance_routers(self, speed: float) -> None:
        """Move each selection bias one step towards an even load (aux-loss-free balancing, report 4.2.2)."""
        for layer in self.model.moe_layers():
            load = sum_over_ranks(layer.expert_load)
            if not layer.hash_routed:
                layer.router_bias += speed * torch.sign(load.mean() - load)
            layer.expert_load.zero_()

    # --- validation

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out metrics over all ranks' batches, in the attention mode of the stage just trained.

        ``validation/text_loss``: mean loss of text tokens. ``validation/recall``: share of key-value answers whose
        every token is the most likely one (teacher-forced); ``validation/needle_recall`` likewise. ``validation/loss``:
        mean loss of text and answer tokens, each kind of document weighing the same; ``validation/mtp_loss`` the same
        for the multi-token prediction of those tokens. Indexer and selection measures are means over csa layers, and
        over the batches that have them; ``validation/choosing_share`` is the share of queries with more entries than
        ``index_topk``: where it is 0, nothing is selected.
        """
        self.model.eval()
        stage = self.stage_at(max(0, self.step - 1))
        attention = "sparse" if stage.attention == "sparse" else "dense"
        metrics: dict[str, float] = {}
        losses, mtp_losses = [], []
        config = self.recipe.model
        for name, batches in self._validation.items():
            counted = TargetKind.TEXT if name == "text" else TargetKind.ANSWER
            # The same keys on every rank, also on one that got no batch: they are summed over ranks by place.
            sums = dict.fromkeys((*_SUMS, *_SELECTION, *(f"{key} batches" for key in _SELECTION)), 0.0)
            for batch in batches:
                telemetry = Telemetry(measure_selection=True, predict_ahead=bool(self.recipe.model.mtp_layers))
                tokens, kinds = batch["tokens"].to(self.device), batch["target_kind"].to(self.device)
                positions = batch["positions"].to(self.device)
                logits = self.model(tokens[:, :-1], positions=positions, attention=attention, telemetry=telemetry)
                chosen = kinds == counted
                each = F.cross_entropy(logits[chosen], tokens[:, 1:][chosen], reduction="sum")
                sums["loss"] += float(each)
                sums["tokens"] += int(chosen.sum())
                if telemetry.mtp_logits is not None:
                    ahead = chosen[:, 1:] & follows(positions)
                    each = F.cross_entropy(telemetry.mtp_logits[ahead], tokens[:, 2:][ahead], reduction="sum")
                    sums["mtp_loss"] += float(each)
                    sums["mtp_tokens"] += int(ahead.sum())
                if name != "text":
                    right, answers = count_answers(logits.argmax(-1) == tokens[:, 1:], chosen)
                    sums["right"] += right
                    sums["answers"] += answers
                means = telemetry.means()
                for key in _SELECTION:
                    if key in means:
                        sums[key] += means[key]
                        sums[f"{key} batches"] += 1
                sums["queries"] += int((positions >= 0).sum())
                sums["choosing"] += int(((positions + 1) // config.csa_ratio > config.index_topk).sum())
            sums = {
                k: v
                for k, v in zip(sums, sum_over_ranks(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist())
            }
            losses.append(sums["loss"] / max(1, sums["tokens"]))
            mtp_losses.append(sums["mtp_loss"] / max(1, sums["mtp_tokens"]))
            if name == "text":
                metrics["validation/text_loss"] = losses[-1]
            else:
                prefix = "" if name == "mqar" else f"{name}_"
                metrics[f"validation/{prefix}answer_loss"] = losses[-1]
                metrics[f"validation/{prefix}recall"] = sums["right"] / max(1, sums["answers"])
            if name == "mqar" or "mqar" not in self._validation:
                for key in _SELECTION:
                    if sums[f"{key} batches"]:
                        metrics[f"validation/{key}"] = sums[key] / sums[f"{key} batches"]
                if "csa" in config.layers:
                    metrics["validation/choosing_share"] = sums["choosing"] / max(1, sums["queries"])
        metrics["validation/loss"] = sum(losses) / len(losses)
        if self.recipe.model.mtp_layers:
            metrics["validation/mtp_loss"] = sum(mtp_losses) / len(mtp_losses)
        self.model.train()
        return metrics


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of logits float32 [B, S, V] against targets int64 [B, S], weighted by float32 [B, S].

    Returns this rank's part of the loss, whose gradients averaged over ranks are those of the whole batch's mean,
    whatever padding each rank drew; and that mean, detached.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
    loss_sum = (losses * weights).sum()
    total_weight = sum_over_ranks(weights.sum()).clamp(min=1.0)  # a batch may be all context
    return loss_sum / total_weight * world_size(), sum_over_ranks(loss_sum.detach().clone()) / total_weight


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


def check_stages(recipe: Recipe) -> None:
    """Refuse a curriculum with a stage that could not act. Raises ConfigError."""
    config, length = recipe.model, recipe.data.sequence_length
    if length > config.max_positions:
        raise ConfigError(f"data.sequence_length: {length} exceeds model.max_positions {config.max_positions}")
    if recipe.train.batch_rows % recipe.train.workers:
        raise ConfigError(
            f"train.batch_rows: {recipe.train.batch_rows} rows do not divide over {recipe.train.workers} workers"
        )
    if config.mtp_layers and recipe.train.mtp_loss_weight == 0:
        raise ConfigError(
            "train.mtp_loss_weight: 0 leaves the model's multi-token prediction untrained; set model.mtp_layers to 0 "
            "to do without"
        )
    for mixer in ("csa", "hca"):
        ratio = config.compress_ratio(mixer)
        if mixer in config.layers and ratio > length:
            raise ConfigError(
                f"model.{mixer}_ratio: {ratio} tokens per entry leave a {length}-token sequence without any entry"
            )
    if "csa" not in config.layers:
        if any(stage.attention == "indexer_warmup" for stage in recipe.train.stages):
            raise ConfigError(
                "train.stages: indexer_warmup was asked for, but model.layers has no csa layer to warm up"
            )
        return
    entries = length // config.csa_ratio
    if entries <= config.index_topk and any(stage.attention == "sparse" for stage in recipe.train.stages):
        raise ConfigError(
            f"model.index_topk: {config.index_topk} is not below the {entries} entries of a {length}-token sequence, "
            "so a sparse stage would select everything"
        )
    if recipe.train.indexer_loss_weight == 0 and any(s.attention != "dense" for s in recipe.train.stages):
        raise ConfigError("train.indexer_loss_weight: 0 leaves the indexer untrained, but a stage relies on it")


def measured_cache(config: ModelConfig, tokens: int = CACHE_MEASURE_TOKENS) -> dict[str, float]:
    """Cache metrics of one sequence, from real storages allocated for ``tokens`` tokens (or the model's maximum)."""
    cache = Cache(config, 1, min(tokens, config.max_positions))
    return {CACHE: cache.bytes_per_token(), "cache/measured_tokens": float(cache.max_tokens)}


def validation_batches(
    rows: Callable[[Kind, int], Iterator[Any]],
    stack: Callable[[Iterable[Any], int], Iterator[Batch]],
    kinds: Iterable[Kind],
    recipe: Recipe,
    rank: int = 0,
    world: int = 1,
) -> dict[str, list[Batch]]:
    """This rank's share of ``train.validation_rows`` held-out rows of each kind, stacked."""
    train = recipe.train
    size = max(1, train.batch_rows // world)
    return {kind: list(stack(list(rows(kind, train.validation_rows))[rank::world], size)) for kind in kinds}


# --- ranks


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum ``x`` over all ranks, in place; itself in a single process."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average gradients over ranks in one message; a missing one counts as zero, so that ranks never disagree."""
    if world_size() == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= world_size()
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = piece.view_as(p)
