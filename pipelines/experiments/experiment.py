"""An experiment: one MLflow run, whose nested runs are trials under Ray Tune. Finished trials are reused."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune

from model.errors import ConfigError, FiftyfoldError
from model.wording import count
from pipelines.data.check import check_prepared
from pipelines.data.manifest import Manifest, read_manifest
from pipelines.experiments.arms import Arm
from pipelines.experiments.trial_process import run_trial
from pipelines.experiments.trials import Result, Trial, plan
from pipelines.ray_runtime.fit import unwrap_ray_error
from pipelines.ray_runtime.session import check_cluster, local_cpus, ray_session, require_resources
from pipelines.ray_runtime.tuner import TrialProgress, fit_tuner, trials_at_once
from pipelines.recipe.experiments import AblateSection, CompareSection
from pipelines.recipe.metrics import LOSS
from pipelines.recipe.schema import Recipe
from pipelines.reports.statistics import too_few
from pipelines.tracking.lineage import dataset_input
from pipelines.tracking.mlflow_store import TrackedRun, open_tracking
from pipelines.tracking.run_folder import bind, lock_run_folder
from pipelines.training import compute_dtype
from pipelines.training.curriculum import check_fills_batch


@dataclass(frozen=True)
class SelectedRate:
    """The learning rate of an arm, and the loss of the first seed at every rate that was tried: None where the training
    failed or diverged."""

    rate: float
    losses: dict[float, float | None]

    @property
    def losses_by_name(self) -> dict[str, float | None]:
        """The losses by the rate as text, for JSON."""
        return {f"{rate:g}": loss for rate, loss in self.losses.items()}


class Experiment:
    """Runs trials of a step, with progress and the time left."""

    def __init__(self, step: str, recipe: Recipe, tracked: TrackedRun):
        self.step, self.recipe, self.tracked = step, recipe, tracked
        self.section: AblateSection | CompareSection = getattr(recipe, step)
        self._labels: dict[str, str] = {}
        """Labels of trials by folder."""
        self._progress = TrialProgress(self.name, functools.partial(_describe, self._labels))

    @property
    def name(self) -> str:
        return self.section.name

    @property
    def folder(self) -> Path:
        return self.recipe.experiments_folder / self.name

    def expect(self, trials: int) -> None:
        """Count trials that will be run later in the time left."""
        self._progress.total += trials

    def run(self, trials: Sequence[Trial]) -> dict[str, str]:
        """Run all trials that have not finished; return messages of failed ones by label. Raises KeyboardInterrupt."""
        pending = {trial.folder: trial for trial in trials if not trial.is_finished}
        self._progress.skip(len(trials) - len(pending))
        if not pending:
            return {}
        for folder, trial in pending.items():
            trial.write()
            self._labels[str(folder)] = trial.label
        descriptions = {str(folder): trial.to_dict() for folder, trial in pending.items()}
        section, use_gpu = self.section, self.recipe.train.use_gpu
        tracking = {"uri": self.tracked.uri, "parent": self.tracked.run_id, "kind": f"{self.step}_trial"}
        trainable = tune.with_resources(
            tune.with_parameters(run_trial, trials=descriptions, tracking=tracking),
            {"CPU": section.cpus_per_trial, **({"GPU": 1.0} if use_gpu else {})},
        )
        tuner = tune.Tuner(
            trainable,
            param_space={"folder": tune.grid_search([str(folder) for folder in pending])},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=trials_at_once(section.cpus_per_trial, section.max_concurrent),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=f"{self.tracked.run_id[:8]}-{time.time_ns()}",
                storage_path=str(self.folder / "tune"),
                verbose=0,
                callbacks=[self._progress],
            ),
        )
        failures = {}
        for result in fit_tuner(tuner, len(pending)):  # type: ignore[attr-defined]
            if result.error is not None:
                trial = pending[Path((result.config or {})["folder"])]
                failures[trial.label] = str(unwrap_ray_error(result.error))
                print(f"{self.name}: {trial.label} failed: {failures[trial.label]}", flush=True)
        return failures

    def select_rates(self, arms: Sequence[Arm]) -> dict[str, SelectedRate]:
        """Return the best learning rate of each arm: the lowest final loss with the first seed.

        Tries the section's ``rates``. While an arm's best rate is at the edge of those tried, tries up to
        ``further_rates`` beyond it. Raises FiftyfoldError for an arm without a finite loss. All finished trials are
        kept.
        """
        seed = self.section.seeds[0]
        trials = {arm.name: {rate: plan(arm, seed, rate) for rate in self.section.rates} for arm in arms}
        failures = self.run([trial for by_rate in trials.values() for trial in by_rate.values()])
        reasons = "; ".join(sorted(set(failures.values()))) or "all diverged"

        def select(name: str) -> SelectedRate:
            failure = f"{self.name}: no learning rate of {name} ended with a finite loss ({reasons})"
            return choose_rate(_losses(trials[name]), f"{failure}; finished trials are kept")

        selected = {arm.name: select(arm.name) for arm in arms}
        for _ in range(self.section.further_rates):
            further = {}
            for arm in arms:
                rate = rate_beyond(selected[arm.name].rate, list(trials[arm.name]))
                if rate is not None:
                    further[arm.name] = trials[arm.name][rate] = plan(arm, seed, rate)
            if not further:
                break
            self.expect(len(further))
            self.run(list(further.values()))
            selected |= {name: select(name) for name in further}
        return selected

    def run_seeds(self, trials: Sequence[Trial]) -> dict[str, list[Result]]:
        """Run trials; return their results by arm, in the order of the seeds.

        Raises FiftyfoldError if some fail. All finished trials are kept.
        """
        failures = self.run(trials)
        if failures:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in failures.items())
            raise FiftyfoldError(
                f"{self.name}: {len(failures)} of {count(len(trials), 'trial')} failed ({reasons}); the others are "
                "kept, run the step again to finish"
            )
        found: dict[str, list[Result]] = {}
        for trial in trials:
            found.setdefault(trial.arm, []).append(trial.result())
        return found


def _describe(labels: Mapping[str, str], trial: Any) -> str:
    """Return the label and the final loss of one of Tune's trials. ``labels`` are by folder."""
    return f"{labels[trial.config['folder']]}: {LOSS} {trial.last_result.get(LOSS, math.nan):.4f}"


def _losses(trials: dict[float, Trial]) -> dict[float, float]:
    """Return the final losses by rate; NaN for a trial that failed."""
    return {rate: trial.result().metrics[LOSS] if trial.is_finished else math.nan for rate, trial in trials.items()}


def choose_rate(losses: dict[float, float], failure: str) -> SelectedRate:
    """Return the rate with the lowest finite loss. Raises FiftyfoldError with the message ``failure`` if none is."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise FiftyfoldError(failure)
    return SelectedRate(min(finite, key=lambda rate: finite[rate]), {rate: finite.get(rate) for rate in losses})


def rate_beyond(selected: float, tried: Sequence[float]) -> float | None:
    """Return the next rate to try if the selected one is the lowest or the highest of several, else None.

    The ratio of the new rate to the selected one is that of the selected one to its neighbor.
    """
    ordered = sorted(tried)
    if len(ordered) < 2 or selected not in (ordered[0], ordered[-1]):
        return None
    neighbor = ordered[1] if selected == ordered[0] else ordered[-2]
    return float(f"{selected * selected / neighbor:.6g}")


@contextmanager
def open_experiment(step: str, recipe: Recipe, arms: Sequence[Arm], manifest: Manifest) -> Iterator[Experiment]:
    """Start or resume the experiment of a step, ``ablate`` or ``compare``, on a Ray cluster.

    An interrupted run with equal settings is resumed. Otherwise the step starts a new one, and reuses finished trials.

    Raises ConfigError or DataError, before any compute, for an arm that cannot be trained on the prepared data.

    Args:
        recipe: The recipe of :func:`resolve_settings`.
        manifest: The manifest of its data.
    """
    section: AblateSection | CompareSection = getattr(recipe, step)
    for arm in arms:
        _check_arm(step, arm, manifest)
    few = too_few(section.seeds)
    if few is not None:
        print(f"{section.name}: {few}", flush=True)
    tracking = open_tracking(recipe)
    folder = recipe.experiments_folder / section.name
    with lock_run_folder(folder, recipe, ("data",), f"{step}.name") as known_run:
        resumed = known_run if known_run and tracking.is_resumable(known_run, recipe) else None
        with ray_session(num_cpus=local_cpus()):  # if Ray does not start, the run stays as it was
            require_resources(f"{step}.cpus_per_trial", section.cpus_per_trial, 1.0 if recipe.train.use_gpu else 0.0)
            with tracking.start_run(section.name, kind=step, recipe=recipe, run_id=resumed) as tracked:
                bind(folder, tracked)
                tracked.log_dataset(dataset_input(recipe.data_folder, manifest, "training"))
                yield Experiment(step, recipe, tracked)


def _check_arm(step: str, arm: Arm, manifest: Manifest) -> None:
    try:
        check_prepared(arm.recipe, manifest)
        check_fills_batch(arm.recipe, manifest)
    except ConfigError as error:
        raise ConfigError(f"{step}: arm {arm.name}: {error}") from None


def resolve_settings(recipe: Recipe) -> tuple[Recipe, Manifest]:
    """Return the recipe with the settings that all arms share, and the manifest of its verified data.

    These are the vocabulary size of the data, and the data types of this machine in place of ``auto``. Raises
    ConfigError or DataError, also if trials run on GPUs and this machine has none.
    """
    check_cluster(recipe)
    recipe = _with_common_dtypes(recipe)
    manifest = read_manifest(recipe.data_folder, verify=True)
    return check_prepared(recipe, manifest), manifest


def _with_common_dtypes(recipe: Recipe) -> Recipe:
    auto = [key for key, value in compute_dtype.settings_of(recipe).items() if value == "auto"]
    if not auto:
        return recipe
    if recipe.train.use_gpu and not torch.cuda.is_available():
        raise ConfigError(
            f"train.use_gpu: this machine has no CUDA device to choose {' and '.join(auto)} for; set them in the recipe"
        )
    return compute_dtype.resolve(recipe, compute_dtype.choose("cuda" if recipe.train.use_gpu else "cpu"))
