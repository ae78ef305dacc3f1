"""Register the best trained run's checkpoint as a model version, and move the alias to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from model import checkpoint as checkpoints
from model.errors import CheckpointError, ConfigError
from pipelines.recipe.schema import PromoteSection, Recipe
from pipelines.reports.cache_measurement import BYTES_PER_TOKEN
from pipelines.reports.terminal import print_table
from pipelines.steps import Step
from pipelines.tracking.mlflow_store import Tracking, open_tracking
from pipelines.tracking.registry import WEIGHTS_TAG, register, weights_digest
from pipelines.tracking.run_folder import find_checkpoint, owner


@dataclass(frozen=True)
class Candidate:
    """A run eligible for promotion."""

    run_id: str
    name: str
    checkpoint: Path
    score: float
    cache_bytes_per_token: float | None
    end_time: int


@dataclass(frozen=True)
class PromoteResult:
    model_uri: str
    version: str
    winner: Candidate


def run(recipe: Recipe) -> PromoteResult:
    """Register the best trained run of the experiment, a sweep's winner included, and move the alias to it.

    A run is eligible if it finished and has the metric ``promote.metric``, a checkpoint of its own, and a cache within
    ``promote.max_cache_bytes_per_token``. Ties go to the smaller cache, then to the newer run.

    Raises ConfigError with the reason for each run if none is eligible, and CheckpointError if the winner's checkpoint
    cannot be loaded or has changed since its evaluation. On failure, the registry is unchanged.
    """
    section = recipe.promote
    tracking = open_tracking(recipe, create=False)
    eligible: list[Candidate] = []
    refused: dict[str, str] = {}
    for stored in tracking.search_runs():
        if stored.data.tags.get("kind") != "train" and "checkpoint" not in stored.data.tags:
            continue  # of a sweep's trials only the winner has a checkpoint
        try:
            eligible.append(_to_candidate(stored, section, recipe.run.folder))
        except _IneligibleError as error:
            refused[f"{stored.info.run_name} ({stored.info.run_id[:8]})"] = str(error)
    if not eligible:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        budget = section.max_cache_bytes_per_token
        within = "" if budget is None else f" and promote.max_cache_bytes_per_token {budget:g}"
        raise ConfigError(
            f"promote: no run of experiment '{recipe.tracking.experiment}' (tracking.experiment) is eligible for "
            f"promote.metric '{section.metric}'{within}: "
            + (reasons or "none was trained yet, run the train step first")
        )
    sign = 1 if section.mode == "max" else -1
    eligible.sort(key=lambda c: (-sign * c.score, c.cache_bytes_per_token or math.inf, -c.end_time))
    winner = eligible[0]
    description = _describe_choice(eligible, section)
    version = _register(tracking, section, winner, description)
    for name, reason in refused.items():
        print(f"refused {name}: {reason}")
    _print_candidates(eligible, section.metric)
    model_uri = f"models:/{section.registered_name}@{section.alias}"
    print(f"{model_uri} is now version {version.version}: {description}", flush=True)
    return PromoteResult(model_uri, str(version.version), winner)


class _IneligibleError(Exception):
    """The reason why a run is not eligible."""


def _to_candidate(stored: Run, section: PromoteSection, runs: Path) -> Candidate:
    metrics, tags = stored.data.metrics, stored.data.tags
    if stored.info.status != "FINISHED":
        raise _IneligibleError(f"its status is {stored.info.status}")
    score = metrics.get(section.metric)
    if score is None or not math.isfinite(score):
        hint = ", run the evaluate step" if section.metric.startswith("eval/") else ""
        raise _IneligibleError(f"has no metric {section.metric}{hint}")
    cache = metrics.get(BYTES_PER_TOKEN)
    budget = section.max_cache_bytes_per_token
    if budget is not None and cache is None:
        raise _IneligibleError(f"has no metric {BYTES_PER_TOKEN} to compare with the budget")
    if budget is not None and cache is not None and cache > budget:
        raise _IneligibleError(f"its cache takes {cache:g} bytes per token, the budget is {budget:g}")
    if "checkpoint" not in tags:
        raise _IneligibleError("names no checkpoint")
    checkpoint = find_checkpoint(runs, stored.info.run_id, Path(tags["checkpoint"]))
    if checkpoint is None:
        raise _IneligibleError(f"its checkpoint {tags['checkpoint']} is not in run.folder {runs}")
    if not checkpoint.is_dir():
        raise _IneligibleError(f"its checkpoint {checkpoint} is gone")
    holder = owner(checkpoint)
    if holder != stored.info.run_id:
        # A later training under the same run.name replaced the folder, so the score belongs to other weights.
        raise _IneligibleError(
            f"its checkpoint folder {checkpoint} now belongs to {f'run {holder}' if holder else 'no run'}"
        )
    return Candidate(stored.info.run_id, stored.info.run_name, checkpoint, score, cache, stored.info.end_time or 0)


def _register(tracking: Tracking, section: PromoteSection, winner: Candidate, description: str) -> ModelVersion:
    config = checkpoints.load(winner.checkpoint).config  # a checkpoint that does not load must not be registered
    evaluated = tracking.client.get_run(winner.run_id).data.tags.get(WEIGHTS_TAG)
    if section.metric.startswith("eval/") and evaluated != weights_digest(winner.checkpoint):
        # An error, since silently promoting the second best would hide that the best has changed.
        raise CheckpointError(
            f"promote: {section.metric} of run {winner.name} ({winner.run_id}) was measured on other weights than "
            f"{winner.checkpoint} holds; evaluate it again"
        )
    metrics = {section.metric: winner.score}
    if winner.cache_bytes_per_token is not None:
        metrics[BYTES_PER_TOKEN] = winner.cache_bytes_per_token
    return register(tracking, section, winner.run_id, winner.checkpoint, config, metrics, description)


def _describe_choice(eligible: list[Candidate], section: PromoteSection) -> str:
    winner = eligible[0]
    text = f"run {winner.name} ({winner.run_id[:8]}) has the best {section.metric}, {winner.score:.4g}"
    if len(eligible) > 1:
        second = eligible[1]
        text += f", of {len(eligible)} eligible runs (next: {second.name}, {second.score:.4g})"
    if section.max_cache_bytes_per_token is not None:
        text += (
            f", with {winner.cache_bytes_per_token:g} cache bytes per token "
            f"within the budget of {section.max_cache_bytes_per_token:g}"
        )
    return text


def _print_candidates(eligible: list[Candidate], metric: str) -> None:
    rows = [
        [c.name, f"{c.score:.4g}", "" if c.cache_bytes_per_token is None else f"{c.cache_bytes_per_token:g}", c.run_id]
        for c in eligible
    ]
    print_table("eligible", ["run", metric, "cache bytes per token", "MLflow run"], rows)


STEP = Step(run)
