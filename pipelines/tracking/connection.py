"""Connections to MLflow tracking stores.

An SQLite store keeps its artifacts in ``mlartifacts`` next to the database, so that both can be moved or copied
together (:mod:`pipelines.tracking.relocation`).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from model.errors import ConfigError
from pipelines.recipe.paths import SERVER_SCHEMES, check_tracking_uri, sqlite_path, sqlite_uri, without_password
from pipelines.recipe.quoting import first_line
from pipelines.tracking.relocation import ARTIFACTS, set_default_artifact_location, update_paths
from pipelines.tracking.server import check_server

DATABASE = "mlflow.db"
"""Name of the default store's database in a runs folder."""
_MOVED = f"if a run folder was moved, move its whole runs folder, with {DATABASE} and {ARTIFACTS}"
"""Advice appended to the error for a missing store."""


def connect(uri: str, create: bool = True, advice: str = _MOVED) -> MlflowClient:
    """Open a client. The URI is checked first, since MLflow retries a wrong one silently for minutes.

    The paths stored in an SQLite store that was moved are updated. Raises ConfigError, and without ``create`` also for
    an SQLite database that does not exist, with ``advice``.
    """
    try:
        check_tracking_uri(uri)
    except ValueError as error:
        raise ConfigError(f"tracking.uri: {error}") from None
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in ("http", "https"):
        check_server(uri, without_password(uri))
    try:
        return MlflowClient(uri, uri) if scheme != "sqlite" else _open_sqlite(uri, create, advice)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        shown = without_password(uri)
        raise ConfigError(f"tracking.uri: {shown} needs the Python package '{error.name}'; install it") from error
    except Exception as error:  # MLflow lets SQLAlchemy's and the drivers' errors through
        raise ConfigError(f"tracking.uri: cannot open {without_password(uri)} ({first_line(error)})") from error


def default_uri(runs: Path) -> str:
    """Return the URI of the default store of a runs folder."""
    return sqlite_uri(runs.absolute() / DATABASE)


def _open_sqlite(uri: str, create: bool, advice: str) -> MlflowClient:
    path = sqlite_path(uri)
    is_new = _check_sqlite(path)
    if is_new and not create:
        raise ConfigError(f"{path}: no such tracking store; {advice}")
    if is_new and not path.parent.is_dir():
        raise ConfigError(f"tracking.uri: the folder {path.parent} of {uri} does not exist")
    with lock(uri):  # concurrent migrations of a fresh database fail
        uri = sqlite_uri(path)  # a URI in another form could make MLflow create a folder
        client = MlflowClient(uri, uri)
        # MLflow keeps artifact locations by run for the whole process, but the runs of a copied store have equal ids.
        _artifact_repos_cache.clear()
        if is_new:
            set_default_artifact_location(path)
        update_paths(path)
        return client


def _check_sqlite(path: Path) -> bool:
    """Return whether a database still has to be created. Raises ConfigError if the file exists but is not an
    SQLite database."""
    try:
        with path.open("rb") as file:
            header = file.read(16)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError as error:
        raise ConfigError(f"tracking.uri: cannot read {path}: {error.strerror}") from error
    if header and header != b"SQLite format 3\0":
        raise ConfigError(f"tracking.uri: {path} is not an SQLite database")
    return not header


@contextmanager
def lock(uri: str) -> Iterator[None]:
    """Hold the file lock of an SQLite store. Other stores handle concurrency themselves, and a read-only one needs
    none."""
    if not uri.startswith("sqlite:"):
        yield
        return
    path = sqlite_path(uri)
    try:
        file = path.with_name(path.name + ".lock").open("w")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        if not path.exists():
            raise ConfigError(f"tracking.uri: {path.parent} cannot be written to ({error.strerror})") from error
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes
        yield


def check_writable(uri: str, key: str) -> None:
    """Raise ConfigError if the files of an SQLite store cannot be written to. ``key`` is the setting that names the
    store."""
    if not uri.startswith("sqlite:"):
        return
    path = sqlite_path(uri)
    for needed in (path.parent, path, path.parent / ARTIFACTS):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise ConfigError(f"{key}: {needed} cannot be written to; results of this step are stored there")


def open_experiment(client: MlflowClient, uri: str, name: str, folder: Path) -> str:
    """Return the id of the experiment ``name``; create it if it does not exist.

    The artifacts of a database other than SQLite go to ``folder``. Raises ConfigError.
    """
    try:
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return client.create_experiment(name, artifact_location=_artifact_location(uri, folder))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)  # another process created it first
    except MlflowException as error:
        raise ConfigError(f"tracking.experiment: cannot open '{name}' ({first_line(error)})") from error
    if found is None or found.lifecycle_stage != "active":
        raise ConfigError(f"tracking.experiment: '{name}' was deleted; restore it or choose another name")
    scheme = urlsplit(uri).scheme
    location = found.artifact_location
    if scheme not in (*SERVER_SCHEMES, "sqlite") and is_local_uri(location):
        path = local_file_uri_to_path(location)
        if not os.path.isdir(path):  # MLflow would create it
            raise ConfigError(
                f"tracking.experiment: '{name}' keeps its artifacts in {path}, which does not exist; restore that "
                "folder or choose another name"
            )
    return found.experiment_id


def _artifact_location(uri: str, folder: Path) -> str | None:
    """Return the artifact location of a new experiment. A server has its own; a bare database would use the current
    folder."""
    scheme = urlsplit(uri).scheme
    if scheme in SERVER_SCHEMES:
        return None
    if scheme == "sqlite":
        return (sqlite_path(uri).parent / ARTIFACTS).as_uri()
    (folder / ARTIFACTS).mkdir(parents=True, exist_ok=True)
    return (folder / ARTIFACTS).as_uri()
