"""The curriculum: a recipe's stages, each with its model, data shape and learning rate settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig
from model.errors import ConfigError, DataError
from model.forward.context import AttentionMode
from model.precision import format_table
from model.wording import count
from pipelines.data.local_reader import local_rows
from pipelines.data.manifest import Manifest
from pipelines.recipe.schema import Recipe


@dataclass(frozen=True)
class Stage:
    index: int
    first_step: int
    """Optimizer steps before this stage."""
    steps: int
    attention: Literal["dense", "indexer_warmup", "sparse"]
    sequence_length: int
    batch_rows: int
    """Sequences per optimizer step, summed over the workers."""
    model: ModelConfig
    """The recipe's model with this stage's ``index_topk`` and ``qat``."""
    learning_rate_scale: float
    indexer_learning_rate: float | None
    """Peak learning rate of the indexers. None leaves it to ``train.optimizer``."""

    @property
    def end(self) -> int:
        return self.first_step + self.steps

    @property
    def warms_up(self) -> bool:
        """True if only the indexers are trained."""
        return self.attention == "indexer_warmup"

    @property
    def attends(self) -> AttentionMode:
        return "sparse" if self.attention == "sparse" else "dense"

    @property
    def tokens_per_step(self) -> int:
        return self.batch_rows * self.sequence_length

    def continues_data_of(self, earlier: Stage) -> bool:
        """Return whether batch shapes are equal, so that reading continues where ``earlier`` stopped."""
        return (self.sequence_length, self.batch_rows) == (earlier.sequence_length, earlier.batch_rows)

    def __str__(self) -> str:
        precision = "quantized" if self.model.qat else "not quantized"
        topk = f", top-{self.model.index_topk}" if self.attention == "sparse" and self.model.indexed_layers else ""
        return (
            f"{self.attention}{topk}, {self.batch_rows} x {self.sequence_length} tokens, {precision}, "
            f"steps {self.first_step + 1} to {self.end}"
        )


def curriculum(recipe: Recipe) -> tuple[Stage, ...]:
    """Return the recipe's stages. Raises ConfigError naming a setting that contradicts or disables another."""
    train, stages = recipe.train, list[Stage]()
    for index, section in enumerate(train.stages):
        length = section.sequence_length or recipe.data.sequence_length
        rows = section.batch_rows or train.batch_rows
        model = recipe.model
        if section.index_topk is not None:
            model = model.replace(index_topk=section.index_topk)
        if section.qat is not None:
            model = model.replace(qat=section.qat)
        stage = Stage(
            index=index,
            first_step=stages[-1].end if stages else 0,
            steps=section.steps if section.steps is not None else (section.tokens or 0) // (rows * length),
            attention=section.attention,
            sequence_length=length,
            batch_rows=rows,
            model=model,
            learning_rate_scale=section.learning_rate_scale,
            indexer_learning_rate=section.indexer_learning_rate,
        )
        _check_stage(recipe, stage)
        stages.append(stage)
    if recipe.model.mtp_layers and train.mtp_loss_weight == 0:
        raise ConfigError(
            "train.mtp_loss_weight: 0 leaves the model's multi-token prediction untrained; set model.mtp_layers to 0 "
            "to remove it"
        )
    if recipe.data.sequence_length > recipe.model.max_positions:
        raise ConfigError(
            f"data.sequence_length: {recipe.data.sequence_length}, the length of validation rows, exceeds "
            f"model.max_positions {recipe.model.max_positions}"
        )
    routers = recipe.model.block_ffn_kinds.count("moe") - recipe.model.num_hash_layers
    if train.stability.anticipatory_routing is not None and routers <= 0:
        raise ConfigError("train.stability.anticipatory_routing: no layer of the model has a router")
    return tuple(stages)


def total_steps(recipe: Recipe) -> int:
    """Return the number of optimizer steps of all stages."""
    return curriculum(recipe)[-1].end


def validation_steps(recipe: Recipe) -> list[int]:
    """Return the steps after which a run validates: every ``train.validate_every``, and the end of each stage."""
    stages, every = curriculum(recipe), recipe.train.validate_every
    return sorted({*range(every, stages[-1].end + 1, every), *(stage.end for stage in stages)})


def stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
    """Return the stage of the update that follows ``step`` updates, or the last stage at the end."""
    return next((stage for stage in stages if step < stage.end), stages[-1])


def tokens_after(stages: tuple[Stage, ...], step: int) -> int:
    """Return the number of tokens in the first ``step`` updates."""
    return sum(min(max(step - stage.first_step, 0), stage.steps) * stage.tokens_per_step for stage in stages)


def total_tokens(recipe: Recipe) -> int:
    """Return the tokens of all stages."""
    stages = curriculum(recipe)
    return tokens_after(stages, stages[-1].end)


def check_fills_batch(recipe: Recipe, manifest: Manifest) -> None:
    """Raise DataError if the training split of the prepared data does not fill one batch of a stage."""
    split = manifest.splits["train"]
    for stage in curriculum(recipe):
        length, rows = stage.sequence_length, stage.batch_rows
        # A lower bound on the rows of the text. If it does not suffice, rows are cut until there are enough.
        if split.targets.get("text", 0) // length >= rows:
            continue
        found = sum(1 for _ in local_rows(recipe.data_folder, "train", length, limit=rows))
        if found < rows:
            raise DataError(
                f"train split: its {sum(split.tokens.values()):,} tokens fill {count(found, 'row')} of {length}, fewer "
                f"than the {rows} of one batch of train.stages.{stage.index}"
            )


def _check_stage(recipe: Recipe, stage: Stage) -> None:
    train, config, length, key = recipe.train, stage.model, stage.sequence_length, f"train.stages.{stage.index}"

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    def name(setting: str, inherited: str) -> str:
        """Return the key of a stage's setting, which is ``inherited`` if the stage has none of its own."""
        return inherited if getattr(train.stages[stage.index], setting) is None else f"{key}.{setting}"

    require(stage.steps > 0, f"{key}.tokens: fewer than the {stage.tokens_per_step} tokens of a single step")
    named = name("sequence_length", "data.sequence_length")
    require(length <= config.max_positions, f"{named}: {length} exceeds model.max_positions {config.max_positions}")
    divisor = train.workers * train.accumulation_steps
    require(
        stage.batch_rows % divisor == 0,
        f"{name('batch_rows', 'train.batch_rows')}: {stage.batch_rows} rows do not divide over "
        f"{count(train.workers, 'worker')} and {count(train.accumulation_steps, 'accumulation step')}",
    )
    require(
        not config.qat or any(loop == "yes" for _, _, loop, _ in format_table(config)),
        f"{name('qat', 'model.qat')}: quantization-aware training is on, but quantizes no tensor",
    )
    try:
        for mixer in set(config.mixers):
            mixer.check_length(config, length)
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from None
    if not config.indexed_layers:
        require(not stage.warms_up, f"{key}: indexer_warmup is set, but no layer of model.layers has an indexer")
        for setting in ("index_topk", "indexer_learning_rate"):
            given = getattr(train.stages[stage.index], setting)
            require(given is None, f"{key}.{setting}: {given} is set, but no layer of model.layers has an indexer")
        return
    entries = min(length // ratio for ratio in config.indexer_ratios.values())
    require(
        stage.attention != "sparse" or entries > config.index_topk,
        f"{name('index_topk', 'model.index_topk')}: {config.index_topk} is not below the {entries} entries of a "
        f"{length}-token sequence, so the sparse {key} would select everything",
    )
    require(
        train.indexer_loss_weight > 0 or stage.attention == "dense",
        f"train.indexer_loss_weight: 0 leaves the indexer untrained, but {key} relies on it",
    )
