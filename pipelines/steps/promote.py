"""The promote step: the best trained run becomes a version of the registered model, under an alias.

What is registered is the checkpoint folder itself (safetensors and JSON) as an MLflow logged model: no pickle, no
Python model to execute on loading.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from model import checkpoint as checkpoints
from model.errors import CheckpointError, ConfigError
from pipelines.recipe.schema import PromoteSection, Recipe
from pipelines.reports.cache_measurement import BYTES_PER_TOKEN
from pipelines.reports.terminal import print_table
from pipelines.steps.evaluate import RUN_FILE, WEIGHTS_TAG, weights_digest
from pipelines.tracking.mlflow_store import Tracking, open_tracking

MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True)
class Candidate:
    """A run that may be promoted."""

    run_id: str
    name: str
    checkpoint: Path
    score: float
    cache_bytes_per_token: float | None
    end_time: int


@dataclass(frozen=True)
class PromoteResult:
    """``refused`` maps each run that could not win, as "name (run id)", to the reason."""

    model_uri: str
    version: str
    winner: Candidate
    eligible: list[Candidate]
    refused: dict[str, str]


def run(recipe: Recipe) -> PromoteResult:
    """Register the best trained run of the experiment, a sweep's winner included, and move the alias to it.

    Eligible is a finished run with the metric ``promote.metric``, a checkpoint of its own, and a cache within
    ``promote.max_cache_bytes_per_token``. Of equal scores the smaller cache wins, then the newer run.
    Raises ConfigError listing why each run was refused when none is left, and CheckpointError when the winner's
    checkpoint cannot be loaded or is not the one that was evaluated; the registry is unchanged then.
    """
    section = recipe.promote
    tracking = open_tracking(recipe)
    eligible: list[Candidate] = []
    refused: dict[str, str] = {}
    for stored in _trained_runs(tracking):
        try:
            eligible.append(_candidate(stored, section))
        except _RefusedError as refusal:
            refused[f"{stored.info.run_name} ({stored.info.run_id[:8]})"] = str(refusal)
    if not eligible:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ConfigError(
            f"promote: no run of experiment '{recipe.tracking.experiment}' is eligible: "
            + (reasons or "none was trained yet, run the train step first")
        )
    sign = 1 if section.mode == "max" else -1
    eligible.sort(key=lambda c: (-sign * c.score, c.cache_bytes_per_token or math.inf, -c.end_time))
    winner = eligible[0]
    why = _why(eligible, section)
    version = _register(tracking, section, winner, why)
    for name, reason in refused.items():
        print(f"refused {name}: {reason}")
    _print(eligible, section.metric)
    model_uri = f"models:/{section.registered_name}@{section.alias}"
    print(f"{model_uri} is now version {version.version}: {why}", flush=True)
    return PromoteResult(model_uri, str(version.version), winner, eligible, refused)


def resolve(tracking: Tracking, model_uri: str, destination: Path | None = None) -> Path:
    """The checkpoint folder behind ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.

    Artifacts on a server are downloaded into ``destination`` (a new temporary folder when None); local ones are used
    where they lie, so treat the folder as read-only. Raises ConfigError when there is no such version.
    """
    match = MODEL_URI.fullmatch(model_uri)
    if match is None:
        raise ConfigError(
            f"serve.model_uri: '{model_uri}' is neither models:/<name>@<alias> nor models:/<name>/<version>"
        )
    name, alias, number = match["name"], match["alias"], match["version"]
    client = tracking.client
    try:
        version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
        # Not download_artifacts(model_uri): that looks the name up in the process-wide registry, not in this one.
        source = client.get_model_version_download_uri(name, version.version)
        folder = mlflow.artifacts.download_artifacts(
            artifact_uri=source, dst_path=None if destination is None else str(destination), tracking_uri=tracking.uri
        )
    except (MlflowException, OSError) as error:
        raise ConfigError(f"serve.model_uri: cannot get {model_uri} ({error}); run the promote step first") from error
    return Path(folder)


# --- candidates


class _RefusedError(Exception):
    """Why a run is no candidate."""


def _trained_runs(tracking: Tracking) -> Iterator[Run]:
    token = None
    while True:
        page = tracking.client.search_runs([tracking.experiment_id], page_token=token)
        # A trial counts once its sweep has kept its checkpoint, which it does for the winner.
        yield from (r for r in page if r.data.tags.get("kind") == "train" or "checkpoint" in r.data.tags)
        token = page.token
        if not token:
            return


def _candidate(stored: Run, section: PromoteSection) -> Candidate:
    metrics, tags = stored.data.metrics, stored.data.tags
    if stored.info.status != "FINISHED":
        raise _RefusedError(f"its status is {stored.info.status}")
    score = metrics.get(section.metric)
    if score is None or not math.isfinite(score):
        hint = ", run the evaluate step" if section.metric.startswith("eval/") else ""
        raise _RefusedError(f"has no metric {section.metric}{hint}")
    cache = metrics.get(BYTES_PER_TOKEN)
    budget = section.max_cache_bytes_per_token
    if budget is not None and cache is None:
        raise _RefusedError(f"has no metric {BYTES_PER_TOKEN} to hold against the budget")
    if budget is not None and cache is not None and cache > budget:
        raise _RefusedError(f"its cache takes {cache:g} bytes per token, the budget is {budget:g}")
    if "checkpoint" not in tags:
        raise _RefusedError("names no checkpoint")
    checkpoint = Path(tags["checkpoint"])
    if not checkpoint.is_dir():
        raise _RefusedError(f"its checkpoint {checkpoint} is gone")
    owner = _owner(checkpoint)
    if owner != stored.info.run_id:
        # A later training under the same run.name replaces the folder: the score is of other weights.
        raise _RefusedError(
            f"its checkpoint folder {checkpoint} now belongs to {f'run {owner}' if owner else 'no run'}"
        )
    return Candidate(stored.info.run_id, stored.info.run_name, checkpoint, score, cache, stored.info.end_time or 0)


def _owner(checkpoint: Path) -> str | None:
    try:
        return json.loads((checkpoint.parent / RUN_FILE).read_text())["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- registry


def _register(tracking: Tracking, section: PromoteSection, winner: Candidate, why: str) -> ModelVersion:
    client = tracking.client
    config = checkpoints.load(winner.checkpoint).config  # a checkpoint that does not load is never registered
    evaluated = client.get_run(winner.run_id).data.tags.get(WEIGHTS_TAG)
    if section.metric.startswith("eval/") and evaluated != weights_digest(winner.checkpoint):
        # The second best must not win quietly because the best was trained on, or damaged, after its evaluation.
        raise CheckpointError(
            f"promote: {section.metric} of run {winner.name} ({winner.run_id}) was measured on other weights than "
            f"{winner.checkpoint} holds; evaluate it again"
        )
    name = section.registered_name
    numbers = {section.metric: winner.score}
    if winner.cache_bytes_per_token is not None:
        numbers[BYTES_PER_TOKEN] = winner.cache_bytes_per_token
    try:
        logged = client.create_logged_model(
            tracking.experiment_id,
            name=name,
            source_run_id=winner.run_id,
            params={key: str(value) for key, value in config.to_dict().items()},
            model_type="fiftyfold checkpoint",
        )
        try:
            client.log_model_artifacts(logged.model_id, str(winner.checkpoint))
            client.finalize_logged_model(logged.model_id, "READY")
        except BaseException:
            client.finalize_logged_model(logged.model_id, "FAILED")
            client.delete_logged_model(logged.model_id)
            if is_local_uri(logged.artifact_location):  # the deletion leaves the files behind
                shutil.rmtree(local_file_uri_to_path(logged.artifact_location), ignore_errors=True)
            raise
        for key, value in numbers.items():
            client.log_metric(winner.run_id, key, value, model_id=logged.model_id)
        _create_registered_model(client, name)
        version = client.create_model_version(
            name,
            # Not "models:/<id>": the registry would look that up in the process-wide store, not in this one.
            source=logged.artifact_location,
            run_id=winner.run_id,
            model_id=logged.model_id,
            tags={key: f"{value:g}" for key, value in numbers.items()},
            description=why,
        )
        # By this tag the UI links the logged model to its version; the client sets it with a server only.
        link = json.dumps([{"name": name, "version": str(version.version)}])
        client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": link})
        client.set_registered_model_alias(name, section.alias, version.version)
    except (MlflowException, OSError) as error:
        raise CheckpointError(f"promote: could not register {winner.checkpoint} as {name}: {error}") from error
    return version


def _create_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


# --- what is told


def _why(eligible: list[Candidate], section: PromoteSection) -> str:
    winner = eligible[0]
    why = f"run {winner.name} ({winner.run_id[:8]}) has the best {section.metric}, {winner.score:.4g}"
    if len(eligible) > 1:
        second = eligible[1]
        why += f", of {len(eligible)} eligible runs (next: {second.name}, {second.score:.4g})"
    if section.max_cache_bytes_per_token is not None:
        why += (
            f", with {winner.cache_bytes_per_token:g} cache bytes per token "
            f"within the budget of {section.max_cache_bytes_per_token:g}"
        )
    return why


def _print(eligible: list[Candidate], metric: str) -> None:
    rows = [
        [c.name, f"{c.score:.4g}", "" if c.cache_bytes_per_token is None else f"{c.cache_bytes_per_token:g}", c.run_id]
        for c in eligible
    ]
    print_table("eligible", ["run", metric, "cache bytes per token", "MLflow run"], rows)
