"""The Ray Train worker: one rank of a training."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from safetensors import SafetensorError

from model.errors import CheckpointError, FiftyfoldError
from pipelines.data.batches import TrainBatches, train_batches
from pipelines.ray_runtime import checkpoint_index
from pipelines.ray_runtime.event_queue import EventQueue, TrainEvent
from pipelines.recipe.loading import recipe_from_dict
from pipelines.training import compute_dtype
from pipelines.training.build import build_trainer
from pipelines.training.curriculum import Stage
from pipelines.training.reporter import WriteCheckpoint


def dataset_name(stage: Stage) -> str:
    """Return the name of the Ray dataset that a stage reads."""
    return f"train-{stage.sequence_length}"


def train_worker(config: dict[str, Any]) -> None:
    """Train one rank. ``config`` holds the plain ``recipe`` and the driver's ``queue``."""
    recipe, queue = recipe_from_dict(config["recipe"]), config["queue"]
    reason = queue.abort_reason()
    if reason is not None:
        raise FiftyfoldError(reason)  # not retryable
    torch.set_num_threads(recipe.train.threads_per_worker)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()

    def open_batches(stage: Stage, epoch: int, skip: int) -> TrainBatches:
        shard = ray.train.get_dataset_shard(dataset_name(stage))
        return train_batches(shard, stage.sequence_length, stage.batch_rows // world, recipe.data.seed, epoch, skip)

    reporter = _RayTrainReporter(queue, rank)
    device, last = ray.train.torch.get_device(), ray.train.get_checkpoint()
    with last.as_directory() if last is not None else contextlib.nullcontext() as folder:
        try:
            trainer = build_trainer(recipe, open_batches, reporter, rank, world, device, folder)
        except CheckpointError as error:
            advice = "" if folder is None else f"; delete the folder {folder} to {_outcome_of_deletion(Path(folder))}"
            queue.abort(f"{error}{advice}")
            raise CheckpointError(f"{error}{advice}") from error
    if last is not None:
        reporter.last = _checkpoint_name(trainer.step)
    reporter.set_tags(trainer.step, compute_dtype.settings_of(trainer.recipe))
    try:
        trainer.run()
    except CheckpointError:
        raise  # retryable from the last checkpoint that could be written
    except FiftyfoldError as error:
        queue.abort(str(error))
        raise


def _outcome_of_deletion(checkpoint: Path) -> str:
    """Return what a resumed training does without its last checkpoint. Without any it starts over."""
    others = [path for path in checkpoint.parent.glob("step_*") if path.is_dir() and path != checkpoint]
    return "resume from an earlier checkpoint" if others else "start over, because no other checkpoint is left"


def _checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


class _RayTrainReporter:
    """Reporter that sends rank 0's events to the driver, and every rank's reports to Ray Train."""

    def __init__(self, queue: EventQueue, rank: int):
        self.queue, self.rank = queue, rank
        self.last: str | None = None
        """Name of the last checkpoint written."""
        self._written = threading.Event()
        self._written.set()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._put(TrainEvent(step, metrics))

    def resumed(self, step: int) -> None:
        self._put(TrainEvent.resumption(step))

    def log_event(self, step: int, message: str) -> None:
        self._put(TrainEvent(step, {}, event=message))

    def set_tags(self, step: int, tags: dict[str, str]) -> None:
        """Set tags of the MLflow run."""
        self._put(TrainEvent(step, {}, tags=tags))

    def report(self, step: int, metrics: dict[str, float], write: WriteCheckpoint | None) -> None:
        sent = self._put(TrainEvent(step, metrics, reported=True))
        if write is None:
            ray.train.report({**metrics, "step": step}, checkpoint_dir_name=_checkpoint_name(step))
            return
        storage = Path(ray.train.get_context().get_storage().experiment_fs_path)

        def upload(target: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            try:
                Path(target.path).mkdir(exist_ok=True)  # its parent is missing if nodes do not share the storage
                write(Path(target.path))
                # A run that resumes from here does not repeat earlier metrics, so they must be recorded first.
                self.queue.wait_acknowledged(sent)
                if self.rank == 0:
                    checkpoint_index.back_up(storage, self.last)
                self.last = name
                return target
            except (OSError, SafetensorError) as error:
                last = self.last or "none"
                raise CheckpointError(
                    f"checkpoint of step {step}: cannot be written ({error}); the last one written is {last}"
                ) from error
            finally:
                self._written.set()

        # Training continues while the copied state is written. A slow disk blocks training here, so that copies do
        # not pile up in memory.
        self._written.wait()
        self._written.clear()
        name = _checkpoint_name(step)
        ray.train.report(
            {**metrics, "step": step},
            checkpoint=ray.train.Checkpoint(str(storage / name)),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,  # written in place
        )

    def _put(self, event: TrainEvent) -> int:
        """Send an event from rank 0; return its number."""
        return 0 if self.rank else self.queue.put(event)
