"""Construction of a trainer from a recipe."""

from __future__ import annotations

from pathlib import Path

import torch

from model import checkpoint
from model.distributed.fsdp import shard
from model.errors import CheckpointError
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from pipelines.data.batches import TrainBatches, train_batches
from pipelines.data.check import check_prepared
from pipelines.data.manifest import read_manifest
from pipelines.recipe.schema import Recipe
from pipelines.training import compute_dtype
from pipelines.training.curriculum import Stage, check_fills_batch, curriculum
from pipelines.training.reporter import Reporter
from pipelines.training.search_space import check_trial
from pipelines.training.trainer import OpenBatches, Trainer
from pipelines.training.validation import held_out_batches


def build_trainer(
    recipe: Recipe,
    open_batches: OpenBatches,
    reporter: Reporter,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    last: str | Path | None = None,
) -> Trainer:
    """Return a trainer that resumes from the checkpoint folder ``last``, or starts at step 0 if it is None.

    A start uses the weights of ``train.init_from``, if set. Every rank gets equal weights, or its shard of them. The
    trainer's recipe has data types in place of ``auto``.
    """
    asked = recipe
    dtypes = compute_dtype.choose(device) if last is None else compute_dtype.read(Path(last))
    recipe = compute_dtype.resolve(asked, dtypes)
    torch.manual_seed(recipe.run.seed)
    validation = held_out_batches(recipe, rank, world)
    model = Transformer(recipe.model)
    model.activation_checkpointing = recipe.train.recompute
    if recipe.train.init_from is not None and last is None:
        checkpoint.warm_start(model, recipe.train.init_from)
    if recipe.train.sharding == "fsdp" and world > 1:
        shard(model, device, gather_dtype(recipe))
    model.to(device)
    trainer = Trainer(recipe, model, open_batches, validation, reporter, load_tokenizer(recipe.data_folder))
    if last is not None:
        trainer.load_checkpoint(Path(last))
        reporter.resumed(trainer.step)
    notice = compute_dtype.describe(asked, recipe, device, resumed=last is not None)
    if notice is not None:
        reporter.log_event(trainer.step, notice)
    return trainer


def gather_dtype(recipe: Recipe) -> torch.dtype:
    """Return the data type in which FSDP gathers matrices: that of their products.

    Experts quantized to FP4 are gathered in float32, so that they are rounded only once.
    """
    quantizes = any(stage.model.qat for stage in curriculum(recipe))
    return torch.bfloat16 if recipe.train.autocast == "bfloat16" and not quantizes else torch.float32


def folder_batches(recipe: Recipe) -> OpenBatches:
    """Return a function that opens a single process's batches from the recipe's data folder, without Ray."""

    def open_batches(stage: Stage, epoch: int, skip: int) -> TrainBatches:
        rows = stage.batch_rows
        return train_batches(recipe.data_folder, stage.sequence_length, rows, recipe.data.seed, epoch, skip)

    return open_batches


def check_point(recipe: Recipe) -> Recipe:
    """Return the recipe of a sweep's trial with the vocabulary of the prepared data.

    Raises ConfigError or DataError if it cannot be trained.
    """
    manifest = read_manifest(recipe.data_folder)
    recipe = check_prepared(recipe, manifest)
    check_trial(recipe)
    check_fills_batch(recipe, manifest)
    return recipe


def check_init_from(recipe: Recipe) -> list[str] | None:
    """Return the tensors that ``train.init_from`` leaves at their random initialization; None if it is not set.

    Raises CheckpointError if the checkpoint does not fit the model.
    """
    if recipe.train.init_from is None:
        return None
    try:
        return checkpoint.warm_start(Transformer(recipe.model), recipe.train.init_from)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"train.init_from: {error}") from error
