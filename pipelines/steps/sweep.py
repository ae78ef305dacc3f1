"""Search cache settings with Ray Tune: ``python -m pipelines sweep --config configs/tiny.yaml``.

Every trial trains like the train step, in its own process or on Ray Train workers of its own. ASHA stops weak trials.
The sweep is one MLflow run with a nested run per trial.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ray import tune
from ray.tune import Checkpoint

from model.atomic_files import write_text
from model.config import ModelConfig
from model.costs import cache_bytes
from model.errors import CheckpointError, ConfigError, DataError, FiftyfoldError
from pipelines.data.check import check_prepared
from pipelines.data.manifest import Manifest, read_manifest
from pipelines.experiments.outputs import command_line, publish
from pipelines.experiments.scoring import check_section, score_tasks
from pipelines.ray_runtime.fit import RAY_RUN, finalize, unwrap_ray_error
from pipelines.ray_runtime.session import check_cluster, local_cpus, ray_session, require_resources
from pipelines.ray_runtime.trial import trial_storage
from pipelines.ray_runtime.tuner import cpus_per_trial, run_trials
from pipelines.recipe.experiments import Setting
from pipelines.recipe.keys import set_key
from pipelines.recipe.loading import with_overrides
from pipelines.recipe.metrics import LOSS, RECALL
from pipelines.recipe.schema import Recipe
from pipelines.recipe.yaml_format import dump_yaml
from pipelines.reports.cache_measurement import BYTES_PER_TOKEN, MEASURED_TOKENS, measured_cache
from pipelines.reports.comparison import task_scores
from pipelines.reports.pareto import Point, SweepReport, tables, verdict
from pipelines.reports.pareto import figure as pareto_figure
from pipelines.steps import Step
from pipelines.tracking.lineage import dataset_input
from pipelines.tracking.mlflow_store import TrackedRun, Tracking, attach, open_tracking
from pipelines.tracking.run_folder import TRAINING_SECTIONS, bind, lock_run_folder, write_settings
from pipelines.training.build import check_init_from, check_point
from pipelines.training.search_space import (
    check_metric,
    check_space,
    combinations,
    decode,
    extreme_models,
    sample_points,
    search_of,
    short_label,
    trial_label,
    trial_recipe,
)

WALL_SECONDS = "sweep/wall_seconds"
_SHOWN = (BYTES_PER_TOKEN, RECALL, LOSS)
_SWEEP_SECTIONS = (*TRAINING_SECTIONS, "sweep")


@dataclass(frozen=True)
class SweepResult:
    run_id: str
    winner: Point
    checkpoint: Path
    """The winner's checkpoint, in a run folder of its own: ``<sweep.name>-winner``."""
    seconds: float
    """Wall time of the trials, over all processes that ran them except killed ones."""


def run(recipe: Recipe) -> SweepResult:
    """Run or resume the sweep ``sweep.name`` and keep its winner.

    Points that cannot be trained are skipped. Raises ConfigError, before any trial starts, if the space holds no valid
    point or none within the cache budget.
    """
    check(recipe)
    manifest = read_manifest(recipe.data_folder, verify=True)
    recipe = check_prepared(recipe, manifest)
    optuna = search_of(recipe) == "optuna"
    points, skipped = _valid_points(recipe, sample_points(recipe) if optuna else combinations(recipe))
    if not points:
        raise ConfigError(f"sweep.space: holds no valid point ({'; '.join(dict.fromkeys(skipped.values()))})")
    check_metric(recipe, points, [kind for kind, rows in manifest.splits["validation"].rows.items() if rows])
    models = extreme_models(recipe) if optuna else (trial_recipe(recipe, settings).model for settings in points)
    _check_budget(recipe, models)
    if optuna:
        skipped = {}  # these are examples; trials are checked when Optuna proposes them
    for label, reason in skipped.items():
        print(f"{recipe.sweep.name}: skipped {label}: {reason}", flush=True)
    tracking = open_tracking(recipe)
    with lock_run_folder(recipe.sweep_folder, recipe, _SWEEP_SECTIONS, "sweep.name") as known_run:
        if known_run is None and _winner_folder(recipe).exists():
            raise ConfigError(
                f"sweep.name: the winner would go to {_winner_folder(recipe)}, which already exists; choose another "
                "sweep.name or delete it"
            )
        if known_run is not None:
            attach(tracking.uri, known_run)  # raises for a run that does not exist
        return _run(recipe, manifest, points, skipped, tracking, known_run)


def check(recipe: Recipe) -> None:
    """Raise ConfigError for settings of the sweep that are wrong with any data."""
    check_cluster(recipe)
    check_space(recipe)
    if recipe.sweep.evaluate_front:
        check_section(recipe)
    kinds = [task for task, weight in recipe.data.retrieval_tasks.items() if weight]
    check_metric(recipe, sample_points(recipe), ["text", *kinds])


def _valid_points(
    recipe: Recipe, points: Iterable[dict[str, Setting]]
) -> tuple[list[dict[str, Setting]], dict[str, str]]:
    """Return the points that can be trained, and the reasons why others cannot, by label."""
    valid, skipped = [], {}
    reasons: dict[str, str | None] = {}
    """Reason why a model cannot start from ``train.init_from``."""
    for settings in points:
        try:
            trial = check_point(trial_recipe(recipe, settings))
            model = repr(trial.model)
            if model not in reasons and not _winner_file(recipe).exists():
                reasons[model] = _init_problem(trial)
            problem = reasons.get(model)
        except (ConfigError, DataError) as error:
            problem = str(error)
        if problem is None:
            valid.append(settings)
        else:
            skipped[trial_label(settings)] = problem
    return valid, skipped


def _init_problem(trial: Recipe) -> str | None:
    try:
        check_init_from(trial)
    except CheckpointError as error:
        return str(error)
    return None


def _check_budget(recipe: Recipe, models: Iterable[ModelConfig]) -> None:
    """Raise ConfigError if there are models and none of their caches fits the budget."""
    budget = recipe.sweep.max_cache_bytes_per_token
    if budget is None:
        return
    sizes = []
    for model in models:
        tokens = min(MEASURED_TOKENS, model.max_positions)
        sizes.append(cache_bytes(model, tokens) / tokens)
    if sizes and min(sizes) > budget:
        raise ConfigError(
            f"sweep.max_cache_bytes_per_token: no point of sweep.space fits {budget:g} bytes; the smallest takes "
            f"{min(sizes):.1f}"
        )


def _run(
    recipe: Recipe,
    manifest: Manifest,
    points: list[dict[str, Setting]],
    skipped: dict[str, str],
    tracking: Tracking,
    known_run: str | None,
) -> SweepResult:
    winner_file = _winner_file(recipe)
    # Capped at this machine's CPUs; a trial that needs more is rejected below.
    at_once = recipe.sweep.max_concurrent or local_cpus()
    cpus = min(at_once * cpus_per_trial(recipe), local_cpus()) + 1
    with ExitStack() as stack:
        stack.enter_context(ray_session(num_cpus=cpus))  # first: if Ray does not start, the run stays as it was
        require_resources("train.workers", cpus_per_trial(recipe))
        run = tracking.start_run(recipe.sweep.name, kind="sweep", recipe=recipe, run_id=known_run)
        tracked = stack.enter_context(run)
        bind(recipe.sweep_folder, tracked)
        tracked.log_dataset(dataset_input(recipe.data_folder, manifest, "training"))
        seconds, started = tracked.metrics().get(WALL_SECONDS, 0.0), time.monotonic()
        try:
            results = list(run_trials(recipe, points, tracked))  # type: ignore[call-overload]
        finally:
            if not winner_file.exists():
                seconds += time.monotonic() - started
                tracked.log_metrics({WALL_SECONDS: seconds})
        errors: dict[str, str] = {}
        for result in results:
            if result.error is not None:
                label, error = trial_label(_settings(result)), unwrap_ray_error(result.error)
                invalid = isinstance(error, ConfigError)
                what = f"skipped {label}" if invalid else f"trial {label} failed"
                print(f"{recipe.sweep.name}: {what}: {error}", flush=True)
                (skipped if invalid else errors)[label] = str(error)
        reported = [result for result in results if not result.error and "trial_id" in (result.metrics or {})]
        run_ids = _end_trial_runs(tracking, tracked.run_id, {result.metrics["trial_id"] for result in reported})
        trials = [_to_point(recipe, result, run_ids) for result in reported]
        if not trials:
            reasons = "; ".join(sorted({*errors.values(), *skipped.values()}))
            raise FiftyfoldError(f"{recipe.sweep.name}: no trial finished ({reasons})")
        winner = choose_winner(trials, recipe)
        by_run = {trial.run_id: result for trial, result in zip(trials, reported)}
        _log_results(recipe, tracked, trials, winner, skipped, by_run)
        target = _keep_winner(recipe, reported[trials.index(winner)], attach(tracked.uri, winner.run_id))
        write_text(winner_file, _to_yaml(winner.settings))
        tracked.log_artifact(winner_file)
    print(f"{recipe.sweep.name}: winner {trial_label(winner.settings)}, checkpoint {target}, settings {winner_file}")
    return SweepResult(tracked.run_id, winner, target, seconds)


def choose_winner(trials: list[Point], recipe: Recipe) -> Point:
    """Return the best trial by ``sweep.metric`` whose cache fits the budget. Ties go to the smaller cache.

    Raises ConfigError if none fits, and FiftyfoldError if none has a finite metric.
    """
    sweep = recipe.sweep
    for trial in trials:
        if sweep.metric not in trial.metrics:
            known = ", ".join(sorted(k for k in trial.metrics if "/" in k))
            raise ConfigError(f"sweep.metric: trials report no '{sweep.metric}'; they report {known}")
    budget = sweep.max_cache_bytes_per_token
    trials = [t for t in trials if math.isfinite(t.metrics[sweep.metric])]
    if not trials:
        raise FiftyfoldError(f"{sweep.name}: no trial has a finite {sweep.metric}")
    fitting = [t for t in trials if budget is None or t.cost <= budget]
    if not fitting:
        smallest = min(t.cost for t in trials)
        raise ConfigError(
            f"sweep.max_cache_bytes_per_token: no trial fits {budget:g} bytes; the smallest takes {smallest:.1f}"
        )
    sign = 1 if sweep.mode == "min" else -1
    return min(fitting, key=lambda t: (sign * t.metrics[sweep.metric], t.cost))


def _end_trial_runs(tracking: Tracking, parent: str, succeeded: set[str]) -> dict[str, str]:
    """Return MLflow run ids by trial id, and end runs still marked as running. ``succeeded`` are trial ids."""
    nested = list(tracking.search_runs(f"tags.`mlflow.parentRunId` = '{parent}'"))
    for run in nested:
        if run.info.status == "RUNNING":  # Tune may kill a stopped trial before it has ended its run
            status = "FINISHED" if run.data.tags.get("trial") in succeeded else "FAILED"
            tracking.client.set_terminated(run.info.run_id, status)
    return {run.data.tags["trial"]: run.info.run_id for run in nested if "trial" in run.data.tags}


def _to_point(recipe: Recipe, result: tune.Result, run_ids: dict[str, str]) -> Point:
    settings = _settings(result)
    reported = result.metrics or {}
    metrics = {k: float(v) for k, v in reported.items() if isinstance(v, int | float) and "/" in k}
    metrics |= measured_cache(trial_recipe(recipe, settings).model)
    run_id = run_ids[reported["trial_id"]]
    return Point(short_label(settings), settings, metrics, run_id, int(reported.get("step", 0)))


def _settings(result: tune.Result) -> dict[str, Setting]:
    return decode((result.config or {})["settings"])


def _log_results(
    recipe: Recipe,
    tracked: TrackedRun,
    trials: list[Point],
    winner: Point,
    skipped: dict[str, str],
    results: dict[str, tune.Result],
) -> None:
    """Print the trials and the verdict, and log them with the Pareto figure to MLflow."""
    section = recipe.sweep
    ordered = sorted(trials, key=lambda t: t.cost)
    report = SweepReport(
        section.name,
        command_line("sweep"),
        recipe.run.seed,
        section.metric,
        section.mode,
        recipe.data.sequence_length,
        section.max_cache_bytes_per_token,
        ordered,
        ordered.index(winner),
        skipped,
    )
    if section.evaluate_front:
        report = _score_front(recipe, report, results)
    front = report.front
    tracked.log_table(
        {
            **{key: [str(t.settings[key]) for t in ordered] for key in trials[0].settings},
            **{name: [t.metrics.get(name, float("nan")) for t in ordered] for name in _SHOWN},
            "steps": [t.steps for t in ordered],
            "front": [i in front for i in range(len(ordered))],
            "winner": [t is winner for t in ordered],
            "run_id": [t.run_id for t in ordered],
        },
        "trials.json",
    )
    sentences = verdict(report)
    figure = pareto_figure(report)
    publish(tracked, "sweep", report.to_dict(), tables(report), {"pareto": figure}, recipe.sweep_folder)
    tracked.log_dict({"verdict": sentences, "skipped": skipped}, "verdict.json")
    print("\n".join(f"  {sentence}" for sentence in sentences), flush=True)
    tracked.log_metrics({f"winner/{name}": winner.metrics[name] for name in _SHOWN if name in winner.metrics})
    tracked.log_metrics({"sweep/hypervolume": report.hypervolume})
    tracked.set_tags({"winner": trial_label(winner.settings), "winner.run_id": winner.run_id})


def _last_checkpoint(recipe: Recipe, result: tune.Result) -> Checkpoint:
    """Return a trial's checkpoint. Raises FiftyfoldError if it left none."""
    last, metrics = result.checkpoint, result.metrics or {}
    if last is None and metrics.get("checkpoint_path"):
        # Tune has only the path of Ray Train's checkpoints, which names the old place if the folder was moved.
        trained = trial_storage(recipe, metrics["trial_id"]) / RAY_RUN
        last = tune.Checkpoint(str(trained / Path(metrics["checkpoint_path"]).name))
    if last is None:
        raise FiftyfoldError(f"{recipe.sweep.name}: trial {trial_label(_settings(result))} left no checkpoint")
    return last


def _score_front(recipe: Recipe, report: SweepReport, results: dict[str, tune.Result]) -> SweepReport:
    """Return the report with the scores of the points on the front. ``results`` are by run id.

    All points get equal documents, whose facts are outside the stacked windows of each. A point has no score for tasks
    and lengths that are refused for its settings, e.g. as vacuous; the reason is printed.
    """
    front = [report.points[index] for index in sorted(report.front)]
    if recipe.evaluate.distance is None:
        models = [trial_recipe(recipe, point.settings).model for point in front]
        distance = max(len(model.layers) * model.window for model in models)
        recipe = with_overrides(recipe, {"evaluate.distance": distance})
    by_length: dict[str, dict[str, float]] = {}
    for point in front:
        with _last_checkpoint(recipe, results[point.run_id]).as_directory() as folder:
            for length, task in itertools.product(recipe.evaluate.lengths, recipe.evaluate.tasks):
                try:
                    metrics = score_tasks(Path(folder), recipe, [task], [length])
                except ConfigError as error:
                    print(f"{report.name}: {point.label}: no score: {error}", flush=True)
                    continue
                scores = task_scores({name: [value] for name, value in metrics.items()})[task]
                by_length.setdefault(f"{task} at {length} tokens", {})[point.run_id] = scores[length][0]
    return dataclasses.replace(report, by_length=by_length)


def _keep_winner(recipe: Recipe, result: tune.Result, tracked: TrackedRun) -> Path:
    """Write a run folder for the winner, bound to its settings; return its checkpoint folder."""
    folder = _winner_folder(recipe)
    last = _last_checkpoint(recipe, result)
    finalize(last, folder / "final")
    settings = _settings(result)
    write_settings(folder, trial_recipe(recipe, settings), TRAINING_SECTIONS)
    bind(folder, tracked)
    tracked.set_tags({"checkpoint": str(folder / "final")})
    return folder / "final"


def _winner_file(recipe: Recipe) -> Path:
    """Return the recipe file of the winner's settings, for ``--config``. It exists once the sweep has finished."""
    return recipe.sweep_folder / "winner.yaml"


def _winner_folder(recipe: Recipe) -> Path:
    return recipe.run.folder / f"{recipe.sweep.name}-winner"


def _to_yaml(settings: dict[str, Setting]) -> str:
    values: dict[str, Setting] = {}
    for key, value in settings.items():
        set_key(values, key, value)
    return dump_yaml(values)


STEP = Step(run, resumes=True)
