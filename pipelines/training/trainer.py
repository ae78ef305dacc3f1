"""The training loop: plain torch, no Ray inside. Ray Train workers, Tune trials and tests all run this one.

Data-parallel ranks hold equal replicas, or each a share of the matrices (:mod:`model.sharding`). Gradients are averaged
in or after the backward pass, weighted by the tokens each rank contributed, so that the update equals the one a single
process would make of the whole batch.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model import checkpoint
from model.errors import CheckpointError, FiftyfoldError
from model.muon import MuonAdamW
from model.parts import Part, Parts
from model.sharding import is_sharded, local_state, set_local_state, settle, shard, spans
from model.telemetry import Telemetry
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from pipelines.data.packing import KINDS, Batch, TargetKind, TrainBatches, local_rows, read_manifest, train_batches
from pipelines.data.packing import batches as stack_rows
from pipelines.recipe.schema import Recipe
from pipelines.training import compute_dtype
from pipelines.training.anticipatory_routing import TENSORS as ANTICIPATED
from pipelines.training.anticipatory_routing import AnticipatoryRouting, Choices
from pipelines.training.collectives import (
    agreed_number,
    average_gradients,
    clip_gradients,
    rank,
    sum_over_ranks,
    world_size,
)
from pipelines.training.curriculum import Stage, curriculum, stage_at
from pipelines.training.loss_spikes import Stability
from pipelines.training.train_state import (
    OPTIMIZER,
    RANDOM,
    STATE,
    Snapshot,
    copied,
    not_finite,
    random_state,
    set_random_state,
    span_in,
)
from pipelines.training.validation import follows, validate

CHOSEN = "chosen/"
"""With a layer's index, the key of a batch's experts where they were chosen ahead: int64 [B, S, K]."""
BEST = "validation/loss"
"""What a run remembers the lowest value of."""

OpenBatches = Callable[[Stage, int, int], TrainBatches]
"""Opens this rank's endless batches of a stage: (stage, epoch, batches to skip)."""


class Reporter(Protocol):
    """Where a training goes with what it learns about itself. Called on every rank, in step."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Cheap numbers of the step just done."""

    def tell(self, step: int, what: str) -> None:
        """Something out of the ordinary that a person should see, in a sentence."""

    def report(self, step: int, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        """Validation metrics (empty when none was due); ``write`` puts this rank's share of a checkpoint into an
        existing folder, which is complete with every rank's (None: not due, or this rank has no share)."""


@dataclass(frozen=True)
class Position:
    """Where reading goes on: the next batch, and the stage whose shape it counts in."""

    stage: int
    epoch: int
    batch: int


class Trainer:
    """Trains ``model`` through the recipe's stages.

    ``validation`` are this rank's shares of the held-out batches by name ("text", "mqar", "needle"). Raises
    ConfigError, before any compute, for a stage that could not do what it says. ``recipe`` names its data types.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Transformer,
        batches: OpenBatches,
        validation: dict[str, list[Batch]],
        reporter: Reporter,
        tokenizer: Tokenizer,
    ):
        self.stages = curriculum(recipe)
        self.recipe, self.model, self.reporter, self.tokenizer = recipe, model, reporter, tokenizer
        self.device = next(model.parameters()).device
        self.sharded = any(map(is_sharded, model.parameters()))
        self.optimizer = MuonAdamW(
            model.named_parameters(), recipe.train.optimizer, model.fused_rows(), divided=world_size() > 1
        )
        self.stability = Stability(recipe.train.stability)
        self.anticipation = AnticipatoryRouting(recipe.train.stability.anticipatory_routing)
        self.step = 0
        self.best: tuple[float, int] | None = None
        """The lowest validation loss and its step."""
        self._open_batches = batches
        self._position = Position(0, 0, 0)
        self._validation = validation
        self._spans = spans(model.named_parameters())
        self._indexer = set(model.indexer_parameters())
        self._rolls_back = recipe.train.stability.action == "roll_back"
        self._last_good: Snapshot | None = None

    @property
    def total_steps(self) -> int:
        return self.stages[-1].end

    @property
    def stage(self) -> Stage:
        """The stage of the next update; the last one at the end."""
        return stage_at(self.stages, self.step)

    # --- checkpoints

    def snapshot(self) -> Snapshot:
        """This moment; every rank must take it.

        Raises FiftyfoldError where a number of it is not finite: the last checkpoint stays the one to go on from.
        """
        state = {
            "step": self.step,
            "position": vars(self._position),
            "best": self.best,
            "stability": self.stability.state(),
            "anticipation": self.anticipation.state(),
        }
        tensors = {**self.optimizer.state_tensors(), **random_state(), **self.anticipation.tensors()}
        model, tensors = copied(local_state(self.model)), copied(tensors)
        broken = not_finite({**model, **tensors})
        if broken is not None:
            raise FiftyfoldError(
                f"step {self.step}: '{broken}' holds numbers that are not finite; checkpoints before it are good"
            )
        part = Part(rank(), Parts(world_size(), f"{agreed_number(self.device):x}")) if self.sharded else None
        dtypes = compute_dtype.of(self.recipe)
        return Snapshot(state, model, self.model.config, tensors, self.tokenizer, self._spans, part, dtypes)

    def load_checkpoint(self, folder: Path) -> None:
        """Go on from a folder that snapshots wrote, sharded as this training or otherwise. Raises CheckpointError."""
        try:
            state = json.loads((folder / STATE).read_text())
            position = Position(**state["position"])
            step = int(state["step"])
            best = state["best"] and (float(state["best"][0]), int(state["best"][1]))
            stability, anticipation, stage = state["stability"], state["anticipation"], self.stages[position.stage]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"{folder / STATE}: not a training state ({error})") from error
        checkpoint.load_weights(self.model, folder)
        tensors = checkpoint.read_tensors(folder, OPTIMIZER, span_in(self._spans))
        broken = not_finite(tensors)
        if broken is not None:
            raise CheckpointError(f"{folder / OPTIMIZER}: tensor '{broken}' holds values that are not finite")
        self._load_training_tensors(tensors)
        self.stability.load(stability)
        self.anticipation.load(anticipation, tensors, self.device)
        self.model.adopt(stage.model)
        self.step, self._position, self.best = step, position, best

    def _load_training_tensors(self, tensors: dict[str, Tensor]) -> None:
        set_random_state(tensors)
        others = (RANDOM, ANTICIPATED)
        self.optimizer.load_state_tensors({name: t for name, t in tensors.items() if not name.startswith(others)})

    def _intervene(self, trouble: str) -> None:
        """Go on without the update that would be the next, from where the recipe says, and tell of it."""
        stability, at = self.recipe.train.stability, self.step + 1
        then = "the update is left out"
        if self._last_good is not None:
            self._roll_back(self._last_good)
            then = f"back to step {self.step}"
        if self.anticipation.left:
            assert stability.anticipatory_routing is not None
            then += f", {self.anticipation.left} updates with experts chosen {stability.anticipatory_routing.lag} ahead"
        count = f"intervention {self.stability.interventions} of {stability.max_interventions}"
        self.reporter.tell(at, f"{trouble}: {then} ({count})")

    def _roll_back(self, kept: Snapshot) -> None:
        """Weights, optimizer and step as they were at the last checkpoint; reading goes on where it is."""
        set_local_state(self.model, kept.model)
        self._load_training_tensors(kept.tensors)
        self.step, self.best = kept.state["step"], kept.state["best"]
        self.anticipation.begin()

    # --- training

    def run(self) -> None:
        """Train from the current step to the last."""
        if self.step >= self.total_steps:
            # No second checkpoint of this step: Ray Train would delete the first one, and the two share a folder.
            self.reporter.report(self.step, self.validate(), None)
            return
        if self._rolls_back and self._last_good is None:
            self._last_good = self.snapshot()
        batches: TrainBatches | None = None
        try:
            self.model.train()
            while self.step < self.total_steps:
                stage = self.stage
                batches = self._batches_of(stage, batches)
                started = time.perf_counter()
                before = self.step
                update, choices = self._anticipated(batches, stage)
                update |= self._update(next(batches) | choices, stage)
                self._position = Position(stage.index, batches.epoch, batches.batch)
                if self._due(self.recipe.train.log_every) or "train/interventions" in update:
                    seconds = time.perf_counter() - started
                    update |= {
                        "train/stage": stage.index + 1,
                        "train/step_seconds": seconds,
                        "train/tokens_per_second": stage.tokens_per_step / seconds,
                    }
                    self.reporter.log(before + 1, {name: float(value) for name, value in update.items()})
                if self.step > before:  # it was not rolled back
                    if self.step == stage.end:
                        self.anticipation.end()
                    self._report(stage)
        finally:
            if batches is not None:
                batches.close()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total_steps

    def _report(self, stage: Stage) -> None:
        """Validate and write a checkpoint where due; at its end, say under its name, too, what a stage reached."""
        train, ends = self.recipe.train, self.step == stage.end
        validates, saves = self._due(train.validate_every) or ends, self._due(train.checkpoint_every) or ends
        metrics: dict[str, float] = {}
        if validates:
            metrics = self.validate()
            if ends:
                reached = {k.removeprefix("validation/"): v for k, v in metrics.items() if k.startswith("validation/")}
                metrics |= {f"stage_{stage.index + 1}/{name}": value for name, value in reached.items()}
        if validates or saves:
            snapshot = self.snapshot() if saves else None
            if snapshot is not None and self._rolls_back:
                self._last_good = snapshot
            has_share = self.sharded or rank() == 0
            self.reporter.report(self.step, metrics, snapshot.write if snapshot is not None and has_share else None)

    def _batches_of(self, stage: Stage, batches: TrainBatches | None) -> TrainBatches:
        """The open batches, or where ``stage`` begins, those that it goes on with."""
        position, before = self._position, self.stages[self._position.stage]
        if stage != before or self.step == stage.first_step:
            self.stability.forget()
            self.model.adopt(stage.model)
        if stage != before and not stage.reads_on_from(before):
            if batches is not None:
                batches.close()
                batches = None
            position = Position(stage.index, position.epoch + 1, 0)
        return batches or self._open_batches(stage, position.epoch, position.batch)

    def _into_decay(self) -> float:
        """How much of the learning rate's fall is over at this step; not above 0 before it has begun."""
        total = self.total_steps
        decay_steps = max(1, round(total * self.recipe.train.decay_share))
        return (self.step - (total - decay_steps)) / decay_steps

    def _rate_scale(self) -> float:
        """Linear warm-up, constant, cosine to ``final_lr_share``; times the stage's own scale."""
        train, into_decay = self.recipe.train, self._into_decay()
        scale = min(1.0, (self.step + 1) / max(1, train.warmup_steps))
        if into_decay > 0:
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, into_decay)))
            scale *= train.final_lr_share + (1 - train.final_lr_share) * cosine
        return scale * self.stage.learning_rate_scale

    def _mtp_weight(self) -> float:
        train = self.recipe.train
        return train.mtp_decay_loss_weight if self._into_decay() > 0 else train.mtp_loss_weight

    def _anticipated(self, batches: TrainBatches, stage: Stage) -> tuple[dict[str, Tensor | float], Batch]:
        """Where experts are chosen ahead, the age and the cost of that, and what the next batch gets of it."""
        if not self.anticipation.left:
            return {}, {}
        started = time.perf_counter()
        age, choices = self.anticipation.next(
            self.step, stage.end, batches, lambda batch: self._choices(self._on_device(batch), stage)
        )
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        seconds = time.perf_counter() - started
        measured: dict[str, Tensor | float] = {"train/anticipation_lag": age, "train/anticipation_seconds": seconds}
        return measured, {f"{CHOSEN}{layer}": chosen for layer, chosen in choices.items()}

    @torch.no_grad()
    def _choices(self, batch: Batch, stage: Stage) -> Choices:
        """The experts that the present weights choose for a batch. Its tokens count when its turn comes."""
        chosen = []
        for part, _ in self._parts(batch, batch["positions"]):
            telemetry = self._telemetry(stage)
            self._logits(part, stage, telemetry)
            self.model.rounded_tensors()  # counted when their turn comes, too
            chosen.append(telemetry.chosen)
        for layer in self.model.moe_layers():
            layer.expert_load.zero_()
        return {layer: torch.cat([part[layer] for part in chosen]) for layer in chosen[0]}

    @contextmanager
    def _choosing(self, part: Batch) -> Iterator[None]:
        """The passes inside take the experts that the part comes with, where it does. So must the backward pass, in
        which recomputed layers route again."""
        for layer in self.model.moe_layers():
            layer.imposed = part.get(f"{CHOSEN}{layer.layer}")
        try:
            yield
        finally:
            for layer in self.model.moe_layers():
                layer.imposed = None

    def _on_device(self, batch: Batch) -> Batch:
        return {name: values.to(self.device) for name, values in batch.items()}

    def _update(self, batch: Batch, stage: Stage) -> dict[str, Tensor | float]:
        """One optimizer step on one batch, unless it is one that stability asks to leave out."""
        train = self.recipe.train
        batch = self._on_device(batch)
        weights = target_weights(batch["target_kind"], train.answer_loss_weight, train.context_loss_weight)
        totals = self._totals(weights, batch["positions"])
        settle(self.model)
        self.model.zero_grad(set_to_none=True)
        self.model.rounded_tensors()  # what came before is not this step's
        means: dict[str, Tensor] = {}
        rounded: Counter[str] = Counter()
        for part, part_weights in self._parts(batch, weights):
            with self._choosing(part):
                objective, losses = self._objective(part, part_weights, totals, stage)
                if objective.requires_grad:  # not in a warm-up on documents that are all too short for an entry
                    objective.backward()
            rounded.update(self.model.rounded_tensors())
            means = {name: means[name] + value if name in means else value for name, value in losses.items()}
        measured: dict[str, Tensor | float] = {
            name: sum_over_ranks(value.clone()) / world_size() for name, value in means.items()
        }
        learning = [p for p in self.model.parameters() if not stage.warms_up or p in self._indexer]
        average_gradients(learning)
        grad_norm = clip_gradients(learning, train.grad_clip)
        if stage.model.qat and not sum(rounded.values()):
            raise FiftyfoldError(f"step {self.step + 1}: quantisation is in the loop, but it rounded no tensor")
        measured |= {f"train/rounded/{role}": float(count) for role, count in rounded.items()}
        measured |= {"train/grad_norm": grad_norm}

        trouble = self.stability.objects(self.step + 1, float(measured["train/loss"]), float(grad_norm))
        if trouble is not None:
            measured["train/interventions"] = self.stability.interventions
            for layer in self.model.moe_layers():
                layer.expert_load.zero_()
            self._intervene(trouble)
            if self._last_good is not None:
                return measured
        else:
            self.optimizer.set_rates(self._rate_scale(), stage.indexer_learning_rate)
            self.optimizer.step()
            self._balance_routers(0.0 if stage.warms_up else train.router_bias_speed)
        measured |= {f"train/learning_rate/{name}": rate for name, rate in self.optimizer.rates().items()}
        self.step += 1
        return measured

    def _parts(self, batch: Batch, weights: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        """The batch in ``accumulation_steps`` parts of as many rows each."""
        rows = len(weights) // self.recipe.train.accumulation_steps
        for start in range(0, len(weights), rows):
            part = slice(start, start + rows)
            yield {name: values[part] for name, values in batch.items()}, weights[part]

    def _totals(self, weights: Tensor, positions: Tensor) -> Totals:
        ahead = weights[:, 1:] * follows(positions)
        scoring = (positions >= self.model.config.csa_ratio - 1).float()
        sums = sum_over_ranks(torch.stack([weights.sum(), ahead.sum(), scoring.sum()])).clamp(min=1.0)
        return Totals(len(weights), *sums.unbind())

    def _objective(
        self, part: Batch, weights: Tensor, totals: Totals, stage: Stage
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What to differentiate, a part of a batch's: gradients summed over parts and averaged over ranks are those
        of the whole batch's means. And the parts' losses, whose sums averaged over ranks are the means themselves."""
        train, telemetry = self.recipe.train, self._telemetry(stage)
        tokens, positions = part["tokens"], part["positions"]
        logits = self._logits(part, stage, telemetry)
        losses = {"train/loss": weighted_loss(logits, tokens[:, 1:], weights, totals.weight)}
        objective = losses["train/loss"] if not stage.warms_up else logits.new_zeros(())
        if "csa" in stage.model.layers:
            # A mean over the tokens with an entry to score. Ranks hold different numbers of them, and one may hold
            # short documents only: it has no divergence to report and must still take part in the sum.
            scoring = (positions >= stage.model.csa_ratio - 1).sum()
            kl = telemetry.loss("indexer_kl")
            kl = scoring * world_size() / totals.scoring * kl if kl is not None else logits.new_zeros(())
            losses["train/indexer_kl"] = kl
            objective = objective + train.indexer_loss_weight * kl
        balance = telemetry.loss("balance")
        if balance is not None:
            losses["train/balance"] = balance * len(tokens) / totals.rows
            if not stage.warms_up:
                objective = objective + train.balance_loss_weight * losses["train/balance"]
        if telemetry.mtp_logits is not None:
            ahead = weights[:, 1:] * follows(positions)
            losses["train/mtp_loss"] = weighted_loss(telemetry.mtp_logits, tokens[:, 2:], ahead, totals.ahead)
            objective = objective + self._mtp_weight() * losses["train/mtp_loss"]
        return objective, {name: loss.detach() for name, loss in losses.items()}

    def _telemetry(self, stage: Stage) -> Telemetry:
        return Telemetry(predict_ahead=bool(stage.model.mtp_layers) and not stage.warms_up)

    def _logits(self, part: Batch, stage: Stage, telemetry: Telemetry) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.train.autocast == "bfloat16"):
            return self.model(
                part["tokens"][:, :-1], positions=part["positions"], attention=stage.attends, telemetry=telemetry
            )

    def _balance_routers(self, speed: float) -> None:
        """Move each selection bias one step towards an even load (aux-loss-free balancing, report 4.2.2)."""
        for layer in self.model.moe_layers():
            load = sum_over_ranks(layer.expert_load)
            if not layer.hash_routed:
                layer.router_bias += speed * torch.sign(load.mean() - load)
            layer.expert_load.zero_()

    def validate(self) -> dict[str, float]:
        """Held-out metrics in the attention mode of the stage just trained (:func:`pipelines.training.validation.validate`)."""
        metrics = validate(self.model, self._validation, stage_at(self.stages, max(0, self.step - 1)).attends)
        if math.isfinite(metrics[BEST]) and (self.best is None or metrics[BEST] < self.best[0]):
            self.best = (metrics[BEST], self.step)
        best = {} if self.best is None else {"best/loss": self.best[0], "best/step": float(self.best[1])}
        return metrics | best


@dataclass(frozen=True)
class Totals:
    """What the means of one batch divide by, over all ranks: scalars; ``rows`` are this rank's."""

    rows: int
    weight: Tensor
    ahead: Tensor
    scoring: Tensor


def target_weights(kinds: Tensor, answer: float, context: float) -> Tensor:
    """Each target's weight in the loss, float32 as ``kinds`` uint8 [B, L] of :class:`pipelines.data.packing.TargetKind`."""
    weights = (kinds != TargetKind.PADDING).float()
    weights = torch.where(kinds == TargetKind.ANSWER, answer, weights)
    return torch.where(kinds == TargetKind.CONTEXT, context, weights)


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """Cross entropy of logits float32 [B, S, V] against targets int64 [B, S], weighted by float32 [B, S].

    ``total`` is the weight of the whole batch on all ranks. The result, averaged over ranks, is the batch's mean,
    whatever padding each rank drew.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
    return (losses * weights).sum() / total * world_size()


def build_trainer(
    recipe: Recipe,
    open_batches: OpenBatches,
    reporter: Reporter,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    last: str | Path | None = None,
) -> Trainer:
    """A trainer that goes on from the checkpoint folder ``last``, or is at step 0, with the recipe's ``init_from``.
    Every rank gets the same weights, or its share of them. Its recipe names the data types that were ``auto``."""
    asked = recipe
    choice = compute_dtype.choose(device) if last is None else compute_dtype.read(Path(last))
    recipe = compute_dtype.resolve(asked, choice)
    torch.manual_seed(recipe.run.seed)
    validation = held_out(recipe, rank, world)
    model = Transformer(recipe.model)
    model.recompute = recipe.train.recompute
    if recipe.train.init_from is not None and last is None:
        checkpoint.warm_start(model, recipe.train.init_from)
    if recipe.train.sharding == "fsdp" and world > 1:
        shard(model, device, gathered_type(recipe))
    model.to(device)
    trainer = Trainer(recipe, model, open_batches, validation, reporter, load_tokenizer(recipe.data_folder))
    if last is not None:
        trainer.load_checkpoint(Path(last))
    notice = compute_dtype.notice(asked, recipe, device, resumed=last is not None)
    if notice is not None:
        reporter.tell(trainer.step, notice)
    return trainer


def gathered_type(recipe: Recipe) -> torch.dtype:
    """What a sharded layer's matrices travel in: what they are multiplied in. Experts that are rounded to FP4 on the
    way are not to be rounded twice."""
    rounds = any(stage.model.qat for stage in curriculum(recipe))
    return torch.bfloat16 if recipe.train.autocast == "bfloat16" and not rounds else torch.float32


def held_out(recipe: Recipe, rank: int = 0, world: int = 1) -> dict[str, list[Batch]]:
    """This rank's share of ``train.validation_rows`` held-out rows of each kind, stacked."""
    folder, train = recipe.data_folder, recipe.train
    size = max(1, train.batch_rows // world)
    found: dict[str, list[Batch]] = {}
    for kind in KINDS:
        rows = local_rows(folder, "validation", recipe.data.sequence_length, [kind], train.validation_rows)
        if read_manifest(folder).splits["validation"].rows.get(kind):
            found[kind] = list(stack_rows(list(rows)[rank::world], size))
    return found


def folder_batches(recipe: Recipe) -> OpenBatches:
    """A single process's batches, read from the recipe's data folder without Ray."""

    def open_batches(stage: Stage, epoch: int, skip: int) -> TrainBatches:
        rows = stage.batch_rows
        return train_batches(recipe.data_folder, stage.sequence_length, rows, recipe.data.seed, epoch, skip)

    return open_batches
