"""Train one model under Ray Train: ``python -m pipelines train --config configs/tiny.yaml``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from model.optim import MuonAdamW
from model.precision import format_table
from model.transformer import Transformer
from pipelines.data.check import check_prepared
from pipelines.data.manifest import Manifest, read_manifest
from pipelines.ray_runtime.event_forwarder import WALL_SECONDS
from pipelines.ray_runtime.fit import finalize, fit, has_begun, require_workers
from pipelines.ray_runtime.session import check_cluster, local_cpus, ray_session
from pipelines.recipe.schema import Recipe
from pipelines.reports.cache_measurement import measured_cache
from pipelines.reports.terminal import TrainingProgress, print_table
from pipelines.steps import Step
from pipelines.tracking.lineage import dataset_input
from pipelines.tracking.mlflow_store import Tracking, attach, open_tracking
from pipelines.tracking.run_folder import TRAINING_SECTIONS, bind, lock_run_folder
from pipelines.tracking.system_metrics import system_metrics
from pipelines.training.build import check_init_from
from pipelines.training.curriculum import check_fills_batch, curriculum, total_steps


@dataclass(frozen=True)
class TrainResult:
    run_id: str
    checkpoint: Path
    metrics: dict[str, float]
    muon_share: float
    """Share of the parameters that Muon updates."""
    seconds: float


def run(recipe: Recipe) -> TrainResult:
    """Train ``run.name`` to its last step and write ``final/``, resuming from its last checkpoint if there is one.

    Raises ConfigError or DataError before any compute. If training fails, the MLflow run ends FAILED.
    """
    check_cluster(recipe)
    manifest = read_manifest(recipe.data_folder, verify=True)
    recipe = check_prepared(recipe, manifest)
    check_fills_batch(recipe, manifest)
    if not recipe.final_checkpoint.exists() and not has_begun(recipe.run_folder):
        initialized = check_init_from(recipe)
        if initialized is not None:
            names = ", ".join(initialized) or "nothing"
            print(f"{recipe.run.name}: starts from {recipe.train.init_from}; newly initialized: {names}")
    tracking = open_tracking(recipe)
    with lock_run_folder(recipe.run_folder, recipe, TRAINING_SECTIONS, "run.name") as known_run:
        return _run(recipe, manifest, tracking, known_run)


def _run(recipe: Recipe, manifest: Manifest, tracking: Tracking, known_run: str | None) -> TrainResult:
    folder = recipe.run_folder
    model = Transformer.on_meta(recipe.model)
    optimizer = MuonAdamW(model.named_parameters(), recipe.train.optimizer, model.split_sizes())
    muon_share = optimizer.muon_share()
    print_plan(recipe, optimizer)
    if known_run is not None:
        finished = attach(tracking.uri, known_run)
        if recipe.final_checkpoint.exists() and tracking.client.get_run(known_run).info.status == "FINISHED":
            print(f"{recipe.run.name}: already trained, checkpoint {recipe.final_checkpoint}")
            metrics = finished.metrics()
            return TrainResult(known_run, recipe.final_checkpoint, metrics, muon_share, metrics.get(WALL_SECONDS, 0.0))
    # Capped at this machine's CPUs; a recipe that needs more is refused.
    cpus = min(recipe.train.workers * recipe.train.cpus_per_worker, local_cpus()) + 1
    with ExitStack() as stack:
        stack.enter_context(ray_session(num_cpus=cpus))  # first: if Ray does not start, the run stays as it was
        require_workers(recipe)
        run = tracking.start_run(recipe.run.name, kind="train", recipe=recipe, run_id=known_run)
        tracked = stack.enter_context(run)
        bind(folder, tracked)
        stack.enter_context(system_metrics(tracked, recipe.tracking.system_metrics_interval))
        tracked.log_dataset(dataset_input(recipe.data_folder, manifest, "training"))
        tracked.log_metrics({**measured_cache(recipe.model), "optimizer/muon_share": muon_share})
        tracked.set_tags({"parameters": str(model.num_parameters())})
        progress = TrainingProgress(recipe.run.name, total_steps(recipe))
        metrics, last = fit(recipe, tracked, progress, folder)
        finalize(last, recipe.final_checkpoint)
        metrics = {**tracked.metrics(), **metrics}
        tracked.set_tags({"checkpoint": str(recipe.final_checkpoint)})
    print(f"{recipe.run.name}: checkpoint {recipe.final_checkpoint}")
    print(f"{recipe.run.name}: MLflow run {tracked.run_id} ({tracked.url_hint()})")
    return TrainResult(tracked.run_id, recipe.final_checkpoint, metrics, muon_share, metrics[WALL_SECONDS])


def print_plan(recipe: Recipe, optimizer: MuonAdamW) -> None:
    """Print the optimizer table, the stages and the precision table."""
    table = optimizer.table(recipe.model.layers)
    rows = [[role, rule, shape, f"{elements:,}", f"{rate:g}"] for role, rule, shape, elements, rate in table]
    columns = ["parameter", "rule", "tensors", "elements", "peak learning rate"]
    print_table(f"{recipe.run.name}: optimizer", columns, rows)
    stages = curriculum(recipe)
    config = recipe.model.replace(qat=any(stage.model.qat for stage in stages))
    precision = format_table(config)
    for stage in stages:
        print(f"{recipe.run.name}: stage {stage.index + 1}: {stage}")
    print_table(
        f"{recipe.run.name}: precision",
        ["tensor", "format", "quantized in training", "tensors"],
        [[role, fmt, loop, str(count)] for role, fmt, loop, count in precision],
    )


STEP = Step(run, resumes=True)
