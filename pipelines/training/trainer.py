"""The training loop in plain PyTorch, without Ray. Ray Train workers, Tune trials and tests all run it.

Data-parallel ranks hold equal replicas or, under FSDP, a shard of the matrices (:mod:`model.distributed`). Gradients
are averaged over ranks, weighted by the tokens of each rank, so that an update equals that of a single process on the
whole batch.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint.rank_shards import RankShard, ShardSet
from model.distributed.dtensor import is_sharded, local_ranges
from model.distributed.fsdp import local_state, reshard_all, set_local_state
from model.errors import MALFORMED, CheckpointError, FiftyfoldError
from model.forward.aux_outputs import AuxOutputs
from model.optim import MuonAdamW
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from pipelines.data.batches import Batch, TrainBatches
from pipelines.recipe.metrics import LOSS, STEP_SECONDS
from pipelines.recipe.schema import Recipe
from pipelines.training import anticipatory_routing, compute_dtype
from pipelines.training.anticipatory_routing import AnticipatoryRouting, ExpertIds
from pipelines.training.collectives import (
    average_gradients,
    clip_gradients,
    rank,
    shared_random_id,
    sum_over_ranks,
    world_size,
)
from pipelines.training.curriculum import Stage, curriculum, stage_at
from pipelines.training.loss_spikes import SpikeDetector
from pipelines.training.objective import combine_losses, denominators, target_weights
from pipelines.training.reporter import Reporter
from pipelines.training.schedule import learning_rate_scale, mtp_loss_weight
from pipelines.training.train_state import (
    OPTIMIZER,
    RANDOM,
    STATE,
    TrainState,
    copy_to_cpu,
    find_nonfinite,
    random_state,
    set_random_state,
    span_lookup,
)
from pipelines.training.validation import validate

EXPERT_IDS = "expert_ids/"
"""With a layer's index, the key of the expert ids in a batch that was routed ahead: int64 [B, S, K]."""

OpenBatches = Callable[[Stage, int, int], TrainBatches]
"""Opens this rank's endless batches of a stage: (stage, epoch, batches to skip)."""


@dataclass(frozen=True)
class DataPosition:
    """The next batch to read, counted in batches of the shape of ``stage``."""

    stage: int
    epoch: int
    batch: int


class Trainer:
    """Trains ``model`` through the recipe's stages.

    Raises ConfigError, before any compute, for an inconsistent stage.

    Args:
        recipe: A recipe without ``auto`` data types.
        validation: This rank's share of the held-out batches, by kind ("text", "mqar", "needle").
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
            model.named_parameters(), recipe.train.optimizer, model.split_sizes(), distributed=world_size() > 1
        )
        self.spikes = SpikeDetector(recipe.train.stability)
        self.anticipatory = AnticipatoryRouting(recipe.train.stability.anticipatory_routing)
        self.step = 0
        self.best: tuple[float, int] | None = None
        """Lowest validation loss and its step."""
        self._open_batches = batches
        self._position = DataPosition(0, 0, 0)
        self._validation = validation
        self._spans = local_ranges(model.named_parameters())
        self._indexer = set(model.indexer_parameters())
        self._rolls_back = recipe.train.stability.action == "roll_back"
        self._last_good: TrainState | None = None

    @property
    def total_steps(self) -> int:
        return self.stages[-1].end

    @property
    def stage(self) -> Stage:
        """Stage of the next update, or the last stage at the end."""
        return stage_at(self.stages, self.step)

    # --- checkpoints

    def snapshot(self) -> TrainState:
        """Copy the current state. Every rank must call it.

        Raises FiftyfoldError if a value is not finite; the last checkpoint remains the one to resume from.
        """
        state = {
            "step": self.step,
            "position": vars(self._position),
            "best": self.best,
            "stability": self.spikes.state(),
            "anticipation": self.anticipatory.state(),
        }
        tensors = {**self.optimizer.state_tensors(), **random_state(), **self.anticipatory.tensors()}
        model, tensors = copy_to_cpu(local_state(self.model)), copy_to_cpu(tensors)
        broken = find_nonfinite({**model, **tensors})
        if broken is not None:
            raise FiftyfoldError(
                f"step {self.step}: '{broken}' holds values that are not finite; checkpoints before it are good"
            )
        shard = None
        if self.sharded:
            shard = RankShard(rank(), ShardSet(world_size(), f"{shared_random_id(self.device):x}"))
        dtypes = compute_dtype.settings_of(self.recipe)
        return TrainState(state, model, self.model.config, tensors, self.tokenizer, self._spans, shard, dtypes)

    def load_checkpoint(self, folder: Path) -> None:
        """Resume from a checkpoint folder, which may be sharded differently. Raises CheckpointError."""
        try:
            state = json.loads((folder / STATE).read_text())
            position = DataPosition(**state["position"])
            step = int(state["step"])
            if not all(type(number) is int and number >= 0 for number in (*astuple(position), step)):
                raise ValueError(f"position {state['position']} of step {step}")
            best = state["best"] and (float(state["best"][0]), int(state["best"][1]))
            spikes, anticipatory, stage = state["stability"], state["anticipation"], self.stages[position.stage]
        except (OSError, *MALFORMED) as error:
            raise CheckpointError(f"{folder / STATE}: not a training state ({error})") from error
        checkpoint.load_weights(self.model, folder)
        tensors = checkpoint.read_tensors(folder, OPTIMIZER, span_lookup(self._spans))
        broken = find_nonfinite(tensors)
        if broken is not None:
            raise CheckpointError(f"{folder / OPTIMIZER}: tensor '{broken}' holds values that are not finite")
        self._load_tensors(tensors)
        self.spikes.load(spikes)
        self.anticipatory.load(anticipatory, tensors, self.device)
        self.model.config = stage.model
        self.step, self._position, self.best = step, position, best

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        set_random_state(tensors)
        others = (RANDOM, anticipatory_routing.TENSORS)
        self.optimizer.load_state_tensors({name: t for name, t in tensors.items() if not name.startswith(others)})

    def _intervene(self, reason: str) -> None:
        """Skip the next update, roll back if the recipe says so, and report it."""
        stability, skipped = self.recipe.train.stability, self.step + 1
        action = "the update is skipped"
        if self._last_good is not None:
            self._roll_back(self._last_good)
            action = f"rolled back to step {self.step}"
        if self.anticipatory.remaining:
            assert stability.anticipatory_routing is not None
            lag = stability.anticipatory_routing.lag
            action += f", {self.anticipatory.remaining} updates with experts routed {lag} ahead"
        count = f"intervention {self.spikes.interventions} of {stability.max_interventions}"
        self.reporter.log_event(skipped, f"{reason}: {action} ({count})")

    def _roll_back(self, last_good: TrainState) -> None:
        """Restore weights, optimizer and step of the last checkpoint. The data position is kept."""
        set_local_state(self.model, last_good.model)
        self._load_tensors(last_good.tensors)
        self.step, self.best = last_good.state["step"], last_good.state["best"]
        self.anticipatory.start()

    # --- training

    def run(self) -> None:
        """Train from the current step to the last."""
        if self.step >= self.total_steps:
            # Without another checkpoint of this step: Ray Train would delete the first one, and both share a folder.
            self.reporter.report(self.step, self.validate(), None)
            return
        if self._rolls_back and self._last_good is None:
            self._last_good = self.snapshot()
        batches: TrainBatches | None = None
        try:
            self.model.train()
            while self.step < self.total_steps:
                stage = self.stage
                batches = self._enter_stage(stage, batches)
                started = time.perf_counter()
                before = self.step
                measured, expert_ids = self._route_ahead(batches, stage)
                measured |= self.train_step(next(batches) | expert_ids, stage)
                self._position = DataPosition(stage.index, batches.epoch, batches.batch)
                if self._is_due(self.recipe.train.log_every) or "train/interventions" in measured:
                    seconds = time.perf_counter() - started
                    measured |= {
                        "train/stage": stage.index + 1,
                        STEP_SECONDS: seconds,
                        "train/tokens_per_second": stage.tokens_per_step / seconds,
                    }
                    self.reporter.log(before + 1, {name: float(value) for name, value in measured.items()})
                if self.step > before:  # not rolled back
                    if self.step == stage.end:
                        self.anticipatory.stop()
                    self._validate_and_save(stage)
        finally:
            if batches is not None:
                batches.close()

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total_steps

    def _validate_and_save(self, stage: Stage) -> None:
        """Validate and save a checkpoint where due. The end of a stage also reports ``stage_<number>/`` metrics."""
        train, ends = self.recipe.train, self.step == stage.end
        validates, saves = self._is_due(train.validate_every) or ends, self._is_due(train.checkpoint_every) or ends
        metrics: dict[str, float] = {}
        if validates:
            metrics = self.validate()
            if ends:
                final = {k.removeprefix("validation/"): v for k, v in metrics.items() if k.startswith("validation/")}
                metrics |= {f"stage_{stage.index + 1}/{name}": value for name, value in final.items()}
        if validates or saves:
            state = self.snapshot() if saves else None
            if state is not None and self._rolls_back:
                self._last_good = state
            has_share = self.sharded or rank() == 0
            self.reporter.report(self.step, metrics, state.write if state is not None and has_share else None)

    def _enter_stage(self, stage: Stage, batches: TrainBatches | None) -> TrainBatches:
        """Return the open batches, reopened if ``stage`` begins with another shape; configure the model for it."""
        position, previous = self._position, self.stages[self._position.stage]
        if stage != previous or self.step == stage.first_step:
            self.spikes.reset()
            self.model.config = stage.model
        if stage != previous and not stage.continues_data_of(previous):
            if batches is not None:
                batches.close()
                batches = None
            position = DataPosition(stage.index, position.epoch + 1, 0)
        return batches or self._open_batches(stage, position.epoch, position.batch)

    def train_step(self, batch: Batch, stage: Stage) -> dict[str, Tensor | float]:
        """Make one optimizer step on ``batch``, unless its gradient or loss is rejected; return its metrics."""
        train, total = self.recipe.train, self.total_steps
        mtp_weight = mtp_loss_weight(train, self.step, total)
        batch = self._to_device(batch)
        weights = target_weights(batch["target_kind"], train.answer_loss_weight, train.context_loss_weight)
        totals = denominators(weights, batch["positions"], self.model.config.indexer_ratios.values())
        reshard_all(self.model)
        self.model.zero_grad(set_to_none=True)
        means: dict[str, Tensor] = {}
        rounded: Counter[str] = Counter()
        expert_load: dict[int, Tensor] = {}
        for part, part_weights in self._microbatches(batch, weights):
            aux = self._aux_outputs(stage)
            logits = self._logits(part, stage, aux)
            objective, losses = combine_losses(part, part_weights, totals, logits, aux, stage, train, mtp_weight)
            if objective.requires_grad:  # false in a warm-up on documents too short for any entry
                objective.backward()
            rounded.update(aux.rounded)
            expert_load = {layer: load + expert_load.get(layer, 0) for layer, load in aux.expert_load.items()}
            means = {name: means[name] + value if name in means else value for name, value in losses.items()}
        measured: dict[str, Tensor | float] = {
            name: sum_over_ranks(value.clone()) / world_size() for name, value in means.items()
        }
        trained = [p for p in self.model.parameters() if not stage.warms_up or p in self._indexer]
        average_gradients(trained)
        grad_norm = clip_gradients(trained, train.grad_clip)
        if stage.model.qat and not sum(rounded.values()):
            raise FiftyfoldError(f"step {self.step + 1}: quantization-aware training quantized no tensor")
        measured |= {f"train/rounded/{role}": float(count) for role, count in rounded.items()}
        measured |= {"train/grad_norm": grad_norm}

        reason = self.spikes.reason_to_skip(self.step + 1, float(measured["train/loss"]), float(grad_norm))
        if reason is not None:
            measured["train/interventions"] = self.spikes.interventions
            self._intervene(reason)
            if self._last_good is not None:
                return measured
        else:
            scale = learning_rate_scale(train, self.step, total) * self.stage.learning_rate_scale
            self.optimizer.set_rates(scale, stage.indexer_learning_rate)
            self.optimizer.step()
            self._balance_routers(expert_load, 0.0 if stage.warms_up else train.router_bias_speed)
        measured |= {f"train/learning_rate/{name}": rate for name, rate in self.optimizer.rates().items()}
        self.step += 1
        return measured

    def _microbatches(self, batch: Batch, weights: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        """Split a batch and its target weights into ``accumulation_steps`` microbatches of equal size."""
        rows = len(weights) // self.recipe.train.accumulation_steps
        for start in range(0, len(weights), rows):
            part = slice(start, start + rows)
            yield {name: values[part] for name, values in batch.items()}, weights[part]

    def _to_device(self, batch: Batch) -> Batch:
        return {name: values.to(self.device) for name, values in batch.items()}

    def _aux_outputs(self, stage: Stage) -> AuxOutputs:
        return AuxOutputs(predict_ahead=bool(stage.model.mtp_layers) and not stage.warms_up)

    def _logits(self, part: Batch, stage: Stage, aux: AuxOutputs) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.train.autocast == "bfloat16"):
            return self.model(
                part["tokens"][:, :-1],
                positions=part["positions"],
                attention=stage.attends,
                aux=aux,
                forced_experts={
                    int(name.removeprefix(EXPERT_IDS)): ids for name, ids in part.items() if name.startswith(EXPERT_IDS)
                },
            )

    def _balance_routers(self, expert_load: dict[int, Tensor], speed: float) -> None:
        """Move each selection bias one step towards an even load (auxiliary-loss-free balancing, report 4.2.2)."""
        for layer in self.model.moe_layers():
            if layer.layer in expert_load and not layer.hash_routed:  # the prediction module idles in a warm-up
                load = sum_over_ranks(expert_load[layer.layer].float())
                layer.router_bias += speed * torch.sign(load.mean() - load)

    # --- anticipatory routing

    def _route_ahead(self, batches: TrainBatches, stage: Stage) -> tuple[dict[str, Tensor | float], Batch]:
        """Return metrics and the expert ids to add to the next batch; both empty where none are routed ahead."""
        if not self.anticipatory.remaining:
            return {}, {}
        started = time.perf_counter()
        age, expert_ids = self.anticipatory.next(
            self.step, stage.end, batches, lambda batch: self._route(self._to_device(batch), stage)
        )
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        seconds = time.perf_counter() - started
        measured: dict[str, Tensor | float] = {"train/anticipation_lag": age, "train/anticipation_seconds": seconds}
        return measured, {f"{EXPERT_IDS}{layer}": ids for layer, ids in expert_ids.items()}

    @torch.no_grad()
    def _route(self, batch: Batch, stage: Stage) -> ExpertIds:
        """Select experts for a batch with the current weights. Its loads are counted at its turn."""
        routed = []
        for part, _ in self._microbatches(batch, batch["positions"]):
            aux = self._aux_outputs(stage)
            self._logits(part, stage, aux)
            routed.append(aux.expert_ids)
        return {layer: torch.cat([part[layer] for part in routed]) for layer in routed[0]}

    # --- validation

    def validate(self) -> dict[str, float]:
        """Return :func:`pipelines.training.validation.validate` in the attention mode of the stage just trained."""
        metrics = validate(self.model, self._validation, stage_at(self.stages, max(0, self.step - 1)).attends)
        if math.isfinite(metrics[LOSS]) and (self.best is None or metrics[LOSS] < self.best[0]):
            self.best = (metrics[LOSS], self.step)
        best = {} if self.best is None else {"best/loss": self.best[0], "best/step": float(self.best[1])}
        return metrics | best
