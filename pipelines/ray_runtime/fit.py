"""The driver's side of a training on Ray Train workers."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch

from model import checkpoint
from model.atomic_files import atomic_folder
from model.errors import FiftyfoldError, is_out_of_memory
from model.tokenizer import load_tokenizer
from pipelines.data.ray_dataset import train_dataset
from pipelines.ray_runtime import checkpoint_index
from pipelines.ray_runtime.event_forwarder import EventForwarder
from pipelines.ray_runtime.event_queue import EventQueue
from pipelines.ray_runtime.process_group import torch_config
from pipelines.ray_runtime.session import require_resources
from pipelines.ray_runtime.worker import dataset_name, train_worker
from pipelines.recipe.quoting import first_line
from pipelines.recipe.schema import Recipe
from pipelines.reports.terminal import TrainingProgress
from pipelines.tracking.mlflow_store import TrackedRun
from pipelines.training import compute_dtype
from pipelines.training.curriculum import curriculum

RAY_RUN = "train"
"""Ray Train's folder in a run folder."""
_UNSENT = "unsent.jsonl"
"""File in a run folder for events that could not be sent to MLflow."""


def has_begun(storage: Path) -> bool:
    """Return whether a training under ``storage`` has a checkpoint to resume from."""
    return (storage / RAY_RUN / checkpoint_index.INDEX).exists()


def require_workers(recipe: Recipe) -> None:
    """Raise ConfigError if the cluster has fewer resources than the workers of a training need."""
    train = recipe.train
    require_resources("train.workers", train.workers * train.cpus_per_worker + 1)  # one reads the data
    require_resources("train.use_gpu", 0, train.workers if train.use_gpu else 0)


def fit(
    recipe: Recipe,
    tracked: TrackedRun,
    progress: TrainingProgress,
    storage: Path,
    callbacks: list[ray.train.UserCallback] | None = None,
) -> tuple[dict[str, float], ray.train.Checkpoint]:
    """Train on Ray Train workers with checkpoints under ``storage``, resuming from the last one there.

    Return the metrics and the checkpoint of the last report. Raises FiftyfoldError. Call :func:`require_workers` first:
    Ray waits forever for resources that the cluster does not have.
    """
    train = recipe.train
    kept = checkpoint_index.repair(storage / RAY_RUN)
    if kept is not None:
        print(f"{recipe.run.name}: repaired the checkpoint index (truncated, or checkpoints deleted); {kept} remain")
    queue = EventQueue()
    forwarder = EventForwarder(queue, tracked, progress, storage / _UNSENT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    with progress, forwarder:
        try:
            result = ray.train.torch.TorchTrainer(
                train_worker,
                train_loop_config={"recipe": recipe.to_dict(), "queue": queue},
                torch_config=torch_config(),
                datasets=_datasets(recipe),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=train.workers,
                    use_gpu=train.use_gpu,
                    resources_per_worker={"CPU": train.cpus_per_worker},
                ),
                run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees that of Train V1
                    name=RAY_RUN,
                    storage_path=str(storage),
                    failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
                    checkpoint_config=ray.train.CheckpointConfig(num_to_keep=train.keep_checkpoints),
                    callbacks=callbacks,  # type: ignore[arg-type]
                    worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(train.threads_per_worker)}},
                ),
            ).fit()
        except SystemExit as error:
            # Ray Train turns Ctrl-C into sys.exit(0). In the thread of a trial, Tune raises SystemExit to stop it.
            raise (KeyboardInterrupt if in_main_thread else error) from None
        except Exception as error:
            raise unwrap_ray_error(error) from error
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, handler)  # Ray Train leaves its own handler installed
    if forwarder.error is not None:
        kept_text = "they are kept" if forwarder.kept else "not all of them could be kept"
        raise FiftyfoldError(
            f"{recipe.run.name}: training finished, but MLflow did not accept all metrics "
            f"({first_line(forwarder.error)}); {kept_text}: run the step again to finish"
        )
    if result.checkpoint is None:
        raise FiftyfoldError(f"{recipe.run.name}: training ended without a checkpoint")
    return dict(result.metrics or {}), result.checkpoint


def _datasets(recipe: Recipe) -> dict[str, Any]:
    """Return the training rows at each sequence length of the stages."""
    return {
        dataset_name(stage): train_dataset(recipe.data_folder, stage.sequence_length, recipe.data.seed)
        for stage in curriculum(recipe)
    }


def unwrap_ray_error(error: BaseException) -> FiftyfoldError:
    """Return the FiftyfoldError within a chain of Ray errors, or a new one: running out of memory, or the chain's last
    line."""
    queue: list[Any] = [error]
    while queue:
        current = queue.pop(0)
        if isinstance(current, FiftyfoldError) and not isinstance(current, ray.exceptions.RayTaskError):
            return current  # Ray's wrapper derives from the original type, but its message holds a traceback
        for inner in (*(getattr(current, name, None) for name in ("cause", "controller_failure")), current.__cause__):
            if isinstance(inner, BaseException):
                queue.append(inner)
        failures = getattr(current, "worker_failures", None) or getattr(current, "_worker_failures", None)
        queue += [f for f in (failures or {}).values() if isinstance(f, BaseException)]
        # Ray Train may wrap a worker's error and keep its text only.
        if is_out_of_memory(current) or "can't allocate memory" in str(current):
            return FiftyfoldError(
                "training failed: not enough memory for a network and batch of these sizes; lower the sizes in model, "
                "or train.batch_rows"
            )
        if isinstance(current, ray.exceptions.OutOfMemoryError):
            return FiftyfoldError(
                "training failed: the node ran out of memory, and Ray ended a worker; free memory, or lower "
                "train.workers or train.batch_rows, and run the step again to resume"
            )
    lines = str(error).strip().splitlines()
    return FiftyfoldError(f"training failed: {lines[-1] if lines else type(error).__name__}")


def finalize(last: ray.train.Checkpoint, target: Path) -> None:
    """Write the model of a training's last checkpoint, with its data types, to the folder ``target`` atomically."""
    checkpoint.check_replaceable(target)
    with last.as_directory() as source, atomic_folder(target) as scratch:
        model = checkpoint.load(source)
        checkpoint.write(model.state_dict(), model.config, scratch, load_tokenizer(source))
        compute_dtype.write(scratch, compute_dtype.read(Path(source)))
