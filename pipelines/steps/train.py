"""Train one model under Ray Train: ``python -m pipelines train --config configs/tiny.yaml``."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.ray_runtime.session import local_cpus, need, ray_session  # sets Ray's environment before ray is imported

# isort: split
import ray
import ray.train
import ray.train.torch
import torch
from safetensors import SafetensorError

from model import checkpoint
from model.errors import CheckpointError, FiftyfoldError
from model.files import atomic_folder
from model.muon import MuonAdamW
from model.precision import Precision
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from pipelines.data.check import fit_to_data
from pipelines.data.packing import TrainBatches, read_manifest, train_batches, train_dataset
from pipelines.ray_runtime import checkpoint_index as checkpoint_list
from pipelines.ray_runtime.event_forwarder import WALL_SECONDS, Listener, News
from pipelines.ray_runtime.event_queue import Mailbox
from pipelines.recipe.schema import Recipe, recipe_from_dict
from pipelines.reports.cache_measurement import measured_cache
from pipelines.reports.terminal import TrainingProgress, print_table
from pipelines.tracking.mlflow_store import TrackedRun, Tracking, attach, first_line, open_tracking
from pipelines.tracking.run_folder import SETTINGS_OF_A_TRAINING, claimed, write_run_file
from pipelines.training import compute_dtype
from pipelines.training.curriculum import Stage, check_data, curriculum, total_steps
from pipelines.training.trainer import build_trainer

RAY_RUN = "train"
"""Ray Train's folder in a run folder."""
_UNSENT = "unsent.jsonl"
"""In a run folder, what MLflow did not take."""


@dataclass(frozen=True)
class TrainResult:
    run_id: str
    checkpoint: Path
    metrics: dict[str, float]
    muon_share: float
    seconds: float


def run(recipe: Recipe, parent_run_id: str | None = None) -> TrainResult:
    """Train ``run.name`` to its last step, from its last checkpoint where there is one, and keep ``final/``.

    Raises ConfigError, DataError before any compute; the MLflow run ends FAILED when training does.
    """
    manifest = read_manifest(recipe.data_folder, verify=True)
    recipe = fit_to_data(recipe, manifest)
    check_data(curriculum(recipe), recipe.data_folder, manifest)
    begun = recipe.final_checkpoint.exists() or (recipe.run_folder / RAY_RUN / checkpoint_list.LIST).exists()
    if not begun:
        fresh = first_weights(recipe)
        if fresh is not None:
            afresh = ", ".join(fresh) or "nothing"
            print(f"{recipe.run.name}: starts from {recipe.train.init_from}; begun afresh: {afresh}")
    tracking = open_tracking(recipe)
    with claimed(recipe.run_folder, recipe, SETTINGS_OF_A_TRAINING, "run.name") as known_run:
        return _run(recipe, tracking, known_run, parent_run_id)


def first_weights(recipe: Recipe) -> list[str] | None:
    """The tensors that a training from ``init_from`` begins afresh; None where it begins all of them.

    Raises CheckpointError where it cannot begin so.
    """
    if recipe.train.init_from is None:
        return None
    try:
        return checkpoint.warm_start(Transformer(recipe.model), recipe.train.init_from)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"train.init_from: {error}") from error


def _run(recipe: Recipe, tracking: Tracking, known_run: str | None, parent_run_id: str | None) -> TrainResult:
    folder = recipe.run_folder
    muon_share = describe(recipe)
    if known_run is not None and recipe.final_checkpoint.exists():
        finished = attach(tracking.uri, known_run)
        if tracking.client.get_run(known_run).info.status == "FINISHED":
            print(f"{recipe.run.name}: trained already, checkpoint {recipe.final_checkpoint}")
            metrics = finished.metrics()
            return TrainResult(known_run, recipe.final_checkpoint, metrics, muon_share, metrics.get(WALL_SECONDS, 0.0))
    tracked = tracking.start_run(
        recipe.run.name, kind="train", recipe=recipe, parent_run_id=parent_run_id, run_id=known_run
    )
    write_run_file(folder, tracked)
    cpus = min(recipe.train.workers * recipe.train.cpus_per_worker, local_cpus()) + 1  # more is refused once it runs
    with tracked, ray_session(num_cpus=cpus):
        tracked.log_metrics({**measured_cache(recipe.model), "optimizer/muon_share": muon_share})
        tracked.set_tags({"parameters": str(_parameters(recipe))})
        progress = TrainingProgress(recipe.run.name, total_steps(recipe))
        metrics, last = fit(recipe, tracked, progress, folder)
        finalise(last, recipe.final_checkpoint)
        metrics = {**tracked.metrics(), **metrics}
        tracked.set_tags({"checkpoint": str(recipe.final_checkpoint)})
    print(f"{recipe.run.name}: checkpoint {recipe.final_checkpoint}")
    print(f"{recipe.run.name}: MLflow run {tracked.run_id} ({tracked.url_hint()})")
    return TrainResult(tracked.run_id, recipe.final_checkpoint, metrics, muon_share, metrics[WALL_SECONDS])


def describe(recipe: Recipe) -> float:
    """Print who gets which optimizer rule and which tensors are rounded to what; returns Muon's share."""
    with torch.device("meta"):
        model = Transformer(recipe.model)
    optimizer = MuonAdamW(model.named_parameters(), recipe.train.optimizer, model.fused_rows())
    rows = [[role, rule, shape, f"{numbers:,}", f"{rate:g}"] for role, rule, shape, numbers, rate in optimizer.table()]
    print_table(
        f"{recipe.run.name}: optimizer", ["parameter", "rule", "tensors", "numbers", "peak learning rate"], rows
    )
    stages = curriculum(recipe)
    config = recipe.model.replace(qat=any(stage.model.qat for stage in stages))
    precision = Precision(config).table(config)
    for stage in stages:
        print(f"{recipe.run.name}: stage {stage.index + 1}: {stage}")
    print_table(
        f"{recipe.run.name}: precision",
        ["tensor", "format", "rounded in training", "tensors"],
        [[role, fmt, loop, str(count)] for role, fmt, loop, count in precision],
    )
    return optimizer.muon_share()


# --- the driver's side


def _parameters(recipe: Recipe) -> int:
    with torch.device("meta"):
        return Transformer(recipe.model).num_parameters()


def fit(
    recipe: Recipe,
    tracked: TrackedRun,
    progress: TrainingProgress,
    storage: Path,
    callbacks: list[ray.train.UserCallback] | None = None,
) -> tuple[dict[str, float], ray.train.Checkpoint]:
    """Train on Ray Train workers, their checkpoints under ``storage``, going on from the last one there.

    Returns the last report's metrics and checkpoint. Raises FiftyfoldError.
    """
    train = recipe.train
    cpus = train.workers * train.cpus_per_worker + 1  # which reads the data
    need("train.workers", cpus)
    need("train.use_gpu", 0, train.workers if train.use_gpu else 0)
    left = checkpoint_list.restore(storage / RAY_RUN)
    if left is not None:
        print(f"{recipe.run.name}: its list of checkpoints was half written, or some are gone; {left} are left")
    mailbox = Mailbox()
    listener = Listener(mailbox, tracked, progress, storage / _UNSENT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    with progress, listener:
        try:
            result = ray.train.torch.TorchTrainer(
                _worker,
                train_loop_config={"recipe": recipe.to_dict(), "mailbox": mailbox},
                datasets=_datasets(recipe),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=train.workers,
                    use_gpu=train.use_gpu,
                    resources_per_worker={"CPU": train.cpus_per_worker},
                ),
                run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees Train V1's
                    name=RAY_RUN,
                    storage_path=str(storage),
                    failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
                    checkpoint_config=ray.train.CheckpointConfig(num_to_keep=train.keep_checkpoints),
                    callbacks=callbacks,  # type: ignore[arg-type]
                    worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(train.threads_per_worker)}},
                ),
            ).fit()
        except SystemExit as error:
            # Ray Train answers Ctrl-C with sys.exit(0); in a trial's thread SystemExit is Tune's way to stop it.
            raise (KeyboardInterrupt if in_main_thread else error) from None
        except Exception as error:
            raise plain(error) from error
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, handler)  # Ray Train leaves its own behind
    if listener.refusal is not None:
        kept = "they are kept" if listener.kept else "not all could be kept, either"
        raise FiftyfoldError(
            f"{recipe.run.name}: trained to its end, but MLflow did not take all its metrics "
            f"({first_line(listener.refusal)}); {kept}: start the step again to finish"
        )
    if result.checkpoint is None:
        raise FiftyfoldError(f"{recipe.run.name}: training ended without a checkpoint")
    return dict(result.metrics or {}), result.checkpoint


def _dataset_name(stage: Stage) -> str:
    return f"train-{stage.sequence_length}"


def _datasets(recipe: Recipe) -> dict[str, Any]:
    """The training rows at each of the stages' lengths. The shards are verified by then."""
    return {
        _dataset_name(stage): train_dataset(recipe.data_folder, stage.sequence_length, recipe.data.seed, verify=False)
        for stage in curriculum(recipe)
    }


def plain(error: BaseException) -> FiftyfoldError:
    """The user's error inside a chain of Ray's, or one sentence about what happened."""
    seen: list[Any] = [error]
    while seen:
        current = seen.pop(0)
        if isinstance(current, FiftyfoldError) and not isinstance(current, ray.exceptions.RayTaskError):
            return current  # Ray's is of the same type, but says where it came from
        for inner in (getattr(current, "cause", None), current.__cause__):
            if isinstance(inner, BaseException):
                seen.append(inner)
        failures = getattr(current, "worker_failures", None) or getattr(current, "_worker_failures", None)
        seen += [f for f in (failures or {}).values() if isinstance(f, BaseException)]
    lines = str(error).strip().splitlines()
    return FiftyfoldError(f"training failed: {lines[-1] if lines else type(error).__name__}")


def finalise(last: ray.train.Checkpoint, target: Path) -> None:
    """Make ``target`` a checkpoint of the model alone, in one piece, from the last one of its training. It names that
    one's data types."""
    checkpoint.check_replaceable(target)
    with last.as_directory() as source, atomic_folder(target) as scratch:
        model = checkpoint.load(source)
        checkpoint.write(model.state_dict(), model.config, scratch, load_tokenizer(source))
        compute_dtype.write(scratch, compute_dtype.read(Path(source)))


# --- the workers' side


def _worker(config: dict[str, Any]) -> None:
    recipe, mailbox = recipe_from_dict(config["recipe"]), config["mailbox"]
    ended = mailbox.ended()
    if ended is not None:
        raise FiftyfoldError(ended)  # which would come again
    torch.set_num_threads(recipe.train.threads_per_worker)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()

    def open_batches(stage: Stage, epoch: int, skip: int) -> TrainBatches:
        shard = ray.train.get_dataset_shard(_dataset_name(stage))
        return train_batches(shard, stage.sequence_length, stage.batch_rows // world, recipe.data.seed, epoch, skip)

    reporter = _RayTrainReporter(mailbox, rank)
    device, last = ray.train.torch.get_device(), ray.train.get_checkpoint()
    with last.as_directory() if last is not None else contextlib.nullcontext() as folder:
        try:
            trainer = build_trainer(recipe, open_batches, reporter, rank, world, device, folder)
        except CheckpointError as error:
            way_on = f"; without the folder {folder} the run goes on from an earlier one" if folder else ""
            mailbox.end(f"{error}{way_on}")
            raise CheckpointError(f"{error}{way_on}") from error
    if last is not None:
        reporter.last = _checkpoint_name(trainer.step)
    reporter.tag(trainer.step, compute_dtype.of(trainer.recipe))
    try:
        trainer.run()
    except CheckpointError:
        raise  # from the last one that could be written, it may go on
    except FiftyfoldError as error:
        mailbox.end(str(error))
        raise


def _checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


class _RayTrainReporter:
    """Rank 0's news goes to the driver's mailbox; every rank takes part in Ray Train's reports."""

    def __init__(self, mailbox: Mailbox, rank: int):
        self.mailbox, self.rank = mailbox, rank
        self.last: str | None = None
        self._written = threading.Event()
        self._written.set()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._put(News(step, metrics))

    def tell(self, step: int, what: str) -> None:
        self._put(News(step, {}, event=what))

    def tag(self, step: int, tags: dict[str, str]) -> None:
        """Set tags of the MLflow run."""
        self._put(News(step, {}, tags=tags))

    def report(self, step: int, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        told = self._put(News(step, metrics, reported=True))
        if write is None:
            ray.train.report({**metrics, "step": step}, checkpoint_dir_name=_checkpoint_name(step))
            return
        storage = Path(ray.train.get_context().get_storage().experiment_fs_path)

        def persist(place: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            try:
                Path(place.path).mkdir(exist_ok=True)  # where storage is not shared by the nodes, its parent is missing
                write(Path(place.path))
                # A run that goes on from here repeats nothing of what came before, so that must be recorded by now.
                self.mailbox.wait(told)
                if self.rank == 0:
                    checkpoint_list.keep_copy(storage, self.last)
                self.last = name
                return place
            except (OSError, SafetensorError) as error:
                last = self.last or "none"
                raise CheckpointError(
                    f"checkpoint of step {step}: cannot be written ({error}); the last one written is {last}"
                ) from error
            finally:
                self._written.set()

        # Written while training goes on: the snapshot is made, and the files come from it. A slow disk holds training
        # up rather than have snapshots pile up in memory.
        self._written.wait()
        self._written.clear()
        name = _checkpoint_name(step)
        ray.train.report(
            {**metrics, "step": step},
            checkpoint=ray.train.Checkpoint(str(storage / name)),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=persist,
            delete_local_checkpoint_after_upload=False,  # it is made where it stays
        )

    def _put(self, news: News) -> int:
        """The number of rank 0's message."""
        return 0 if self.rank else self.mailbox.put(asdict(news))
