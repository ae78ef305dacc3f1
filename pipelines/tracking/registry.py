"""The MLflow model registry: checkpoint folders as versions of a registered model.

A version is the checkpoint folder itself (safetensors and JSON) as an MLflow logged model: no pickle, and no Python
model to execute on loading.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.regular_files import check_regular
from pipelines.recipe.paths import MODEL_URI
from pipelines.recipe.schema import PromoteSection
from pipelines.tracking.mlflow_store import Tracking

WEIGHTS_TAG = "eval.weights_sha256"
"""Tag of a run with the digest of the weights that its ``eval/`` metrics belong to."""


def weights_digest(checkpoint: Path) -> str:
    """Return the SHA-256 of a checkpoint's stored weights. Raises CheckpointError if they cannot be read."""
    digest = hashlib.sha256()
    for path in checkpoints.weight_files(checkpoint):
        try:
            check_regular(path)
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()


def find_version(tracking: Tracking, model_uri: str, key: str) -> ModelVersion:
    """Return the version that ``models:/<name>@<alias>`` or ``models:/<name>/<version>`` names.

    Raises ConfigError, naming the recipe's ``key``, if there is none.
    """
    match = MODEL_URI.fullmatch(model_uri)
    if match is None:
        raise ConfigError(f"{key}: '{model_uri}' is neither models:/<name>@<alias> nor models:/<name>/<version>")
    name, alias, number = match["name"], match["alias"], match["version"]
    client = tracking.client
    try:
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except (MlflowException, OSError) as error:
        raise ConfigError(f"{key}: cannot get {model_uri} ({error}); run the promote step first") from error


def download(tracking: Tracking, model_uri: str, destination: Path, key: str) -> Path:
    """Return the checkpoint folder of ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.

    Artifacts in a file system of this machine are used in place, so the folder must not be written to. Others are
    copied into the new folder ``destination``. Raises ConfigError, naming the recipe's ``key``, if there is no such
    version.
    """
    version = find_version(tracking, model_uri, key)
    try:
        # download_artifacts(model_uri) would look the name up in the process-wide registry instead of this one.
        source = tracking.client.get_model_version_download_uri(version.name, version.version)
        folder = mlflow.artifacts.download_artifacts(
            artifact_uri=source, dst_path=None if is_local_uri(source) else str(destination), tracking_uri=tracking.uri
        )
    except (MlflowException, OSError) as error:
        raise ConfigError(f"{key}: cannot get {model_uri} ({error}); run the promote step first") from error
    return Path(folder)


def register(
    tracking: Tracking,
    section: PromoteSection,
    run_id: str,
    checkpoint: Path,
    config: ModelConfig,
    metrics: Mapping[str, float],
    description: str,
) -> ModelVersion:
    """Register a checkpoint as a new version and move the alias to it.

    Raises CheckpointError if any part fails, and leaves the registry unchanged.

    Args:
        run_id: The MLflow run that trained the checkpoint.
        config: The checkpoint's configuration, stored as parameters.
        metrics: Metrics to store with the version.
    """
    client, name = tracking.client, section.registered_name
    try:
        with ExitStack() as undo:
            logged = client.create_logged_model(
                tracking.experiment_id,
                name=name.replace(".", "-"),  # MLflow allows the dot in registered names only
                source_run_id=run_id,
                params={key: str(value) for key, value in config.to_dict().items()},
                model_type="fiftyfold checkpoint",
            )
            undo.callback(_delete_logged_model, client, logged)
            client.log_model_artifacts(logged.model_id, str(checkpoint))
            client.finalize_logged_model(logged.model_id, "READY")
            for key, value in metrics.items():
                client.log_metric(run_id, key, value, model_id=logged.model_id)
            if _create_registered_model(client, name):
                undo.callback(client.delete_registered_model, name)
            version = client.create_model_version(
                name,
                # "models:/<id>" would be looked up in the process-wide store instead of this one.
                source=logged.artifact_location,
                run_id=run_id,
                model_id=logged.model_id,
                tags={key: f"{value:g}" for key, value in metrics.items()},
                description=description,
            )
            undo.callback(client.delete_model_version, name, version.version)
            # The UI links a logged model to its version by this tag, which the client sets only with a server.
            link = json.dumps([{"name": name, "version": str(version.version)}])
            client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": link})
            client.set_registered_model_alias(name, section.alias, version.version)
            undo.pop_all()
    except (MlflowException, OSError) as error:
        raise CheckpointError(f"promote: could not register {checkpoint} as {name}: {error}") from error
    return version


def _delete_logged_model(client: MlflowClient, logged: LoggedModel) -> None:
    client.finalize_logged_model(logged.model_id, "FAILED")
    client.delete_logged_model(logged.model_id)
    if is_local_uri(logged.artifact_location):  # the deletion leaves the files behind
        shutil.rmtree(local_file_uri_to_path(logged.artifact_location), ignore_errors=True)


def _create_registered_model(client: MlflowClient, name: str) -> bool:
    """Create the registered model ``name``; return whether it is new."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False
    return True
