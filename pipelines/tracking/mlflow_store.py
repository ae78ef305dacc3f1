"""Access to the MLflow tracking store through a client with an explicit URI.

The default store is an SQLite file ``<run.folder>/mlflow.db`` with artifacts in ``<run.folder>/mlartifacts``;
``tracking.uri`` names another database or a tracking server. MLflow's fluent functions are avoided: they keep the URI,
the experiment and the active run in process-wide state and environment variables, which Ray workers would inherit.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import (
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
)

from model.errors import ConfigError
from pipelines.recipe.paths import sqlite_uri
from pipelines.recipe.yaml_format import dump_yaml
from pipelines.tracking.server import check_server

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipelines.recipe.schema import Recipe

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

SERVER_SCHEMES = ("http", "https", "databricks")
DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")

# Both announce a fresh database on the terminal.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Tracking:
    """An open tracking store and the experiment that holds the runs."""

    uri: str
    experiment_id: str
    client: MlflowClient

    def start_run(
        self,
        name: str,
        *,
        kind: str,
        recipe: Recipe,
        parent_run_id: str | None = None,
        run_id: str | None = None,
    ) -> TrackedRun:
        """Start a run, or resume the run ``run_id``. Raises ConfigError if ``run_id`` does not exist.

        A new run stores the recipe as parameters with dotted keys, with long values cut to MLflow's limit, and as the
        artifact ``config.yaml``. Its tags are ``kind``, ``git.commit`` and ``git.dirty`` ("unknown" outside git).
        MLflow's parameters are immutable: resuming with a changed recipe replaces ``config.yaml`` and lists the changed
        keys in the tag ``resumed.changed``.
        """
        params = _params(recipe)
        if run_id is not None:
            run = attach(self.uri, run_id)
            self.client.update_run(run_id, status="RUNNING")
            stored = self.client.get_run(run_id).data.params
            changed = [
                f"{key}: {stored.get(key, '(absent)')} -> {value}"
                for key, value in params.items()
                if stored.get(key) != value
            ]
            if changed:
                run.set_tags({"resumed.changed": "; ".join(changed)})
        else:
            tags = {"kind": kind, **git_tags()}
            if parent_run_id is not None:
                tags["mlflow.parentRunId"] = parent_run_id
            created = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
            run = TrackedRun(self.uri, created.info.run_id, self.experiment_id, self.client)
            entries = [Param(key, value) for key, value in params.items()]
            for batch in _slices(entries, MAX_PARAMS_TAGS_PER_BATCH):
                self.client.log_batch(run.run_id, params=batch)
        self.client.log_text(run.run_id, dump_yaml(recipe.to_dict()), "config.yaml")
        return run


class TrackedRun:
    """One MLflow run. As a context manager it ends the run: FAILED after an exception, KILLED after Ctrl-C.

    To log from another process, send the strings ``uri`` and ``run_id`` and call :func:`attach` there.
    """

    def __init__(self, uri: str, run_id: str, experiment_id: str, client: MlflowClient):
        self.uri = uri
        self.run_id = run_id
        self.experiment_id = experiment_id
        self._client = client
        self._nonfinite: set[str] = set()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics at ``step`` (0 if None).

        NaN and infinities are dropped: MLflow stores an infinity as 1.8e308, which ruins every chart. The first one of
        each metric is printed and kept in the tag ``not_finite.<metric>``.
        """
        now = time.time_ns() // 1_000_000
        finite = []
        for key, value in metrics.items():
            value = float(value)
            if math.isfinite(value):
                finite.append(Metric(key, value, now, step or 0))
            elif key not in self._nonfinite:
                self._nonfinite.add(key)
                note = f"{value} at step {step or 0}"
                print(f"metric {key} is {note}; not logged to MLflow", flush=True)
                self.set_tags({f"not_finite.{key}": note})
        for batch in _slices(finite, MAX_METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=batch)

    def log_event(self, step: int, message: str) -> None:
        """Append a message about ``step`` to the tag ``event.<step>``."""
        key = f"event.{step:06d}"
        logged = self._client.get_run(self.run_id).data.tags.get(key)
        if logged is None or message not in logged:  # a resumed run repeats events
            self.set_tags({key: message if logged is None else f"{logged}; {message}"})

    def metrics(self) -> dict[str, float]:
        """Return the last value of every metric."""
        return dict(self._client.get_run(self.run_id).data.metrics)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Copy a local file, or the content of a folder, to the artifacts, under ``folder`` if given."""
        if Path(path).is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)

    def log_dict(self, content: Mapping[str, Any], file: str) -> None:
        """Store a mapping as the artifact ``file`` (.json, .yaml or .yml)."""
        self._client.log_dict(self.run_id, dict(content), file)

    def log_figure(self, figure: Figure, file: str) -> None:
        """Store a matplotlib figure as the artifact ``file`` (.png, .svg, .pdf)."""
        self._client.log_figure(self.run_id, figure, file)

    def log_table(self, columns: Mapping[str, Sequence[Any]], file: str) -> None:
        """Store a table as the artifact ``file`` (.json), which the UI shows as a table. Replaces an earlier one."""
        parent = file.rpartition("/")[0] or None
        if file in {info.path for info in self._client.list_artifacts(self.run_id, parent)}:
            # MLflow's log_table would append to the earlier rows.
            rows = [list(row) for row in zip(*columns.values(), strict=True)]
            self._client.log_text(self.run_id, json.dumps({"columns": list(columns), "data": rows}), file)
        else:
            self._client.log_table(self.run_id, {key: list(values) for key, values in columns.items()}, file)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags. MLflow truncates long values."""
        entries = [RunTag(key, str(value)) for key, value in tags.items()]
        for batch in _slices(entries, MAX_PARAMS_TAGS_PER_BATCH):
            self._client.log_batch(self.run_id, tags=batch)

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """End the run."""
        self._client.set_terminated(self.run_id, status)

    def url_hint(self) -> str:
        """Return the run's address on the tracking server, or how to open it in the UI."""
        page = f"/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        if urlsplit(self.uri).scheme in ("http", "https"):
            return _without_password(self.uri).rstrip("/") + page
        return f"{ui_command(self.uri)}, then http://127.0.0.1:5000{page}"

    def __enter__(self) -> TrackedRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        # Ray Tune raises SystemExit(0) in a trial that its scheduler stops.
        if kind is None or (isinstance(error, SystemExit) and not error.code):
            self.finish()
            return
        try:
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")
        except Exception as failure:  # the block's own error is more important
            print(
                f"run {self.run_id}: left as running, because MLflow does not answer ({first_line(failure)})",
                flush=True,
            )


def open_tracking(recipe: Recipe) -> Tracking:
    """Open the tracking store of ``recipe``; create its database and experiment on first use.

    Safe to call from several processes at once. Raises ConfigError naming a URI that cannot be opened.
    """
    folder = recipe.run.folder.absolute()
    uri = recipe.tracking.uri
    if uri is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.folder: cannot create {folder}: {error.strerror}") from error
        uri = sqlite_uri(folder / "mlflow.db")
    elif uri.startswith("sqlite:///"):
        # Workers run in their own folders, so a URI sent to them must hold an absolute path.
        uri = sqlite_uri(_sqlite_path(uri).absolute())
    client = _connect(uri)
    with _lock(uri):
        return Tracking(uri, _experiment(client, uri, recipe.tracking.experiment, folder), client)


def attach(uri: str, run_id: str) -> TrackedRun:
    """Return an existing run, e.g. in a Ray worker. Raises ConfigError if there is none."""
    client = _connect(uri)
    try:
        info = client.get_run(run_id).info
    except MlflowException as error:
        raise ConfigError(f"run {run_id}: not found in {_without_password(uri)} ({first_line(error)})") from error
    if info.lifecycle_stage != "active":
        raise ConfigError(f"run {run_id}: was deleted from {_without_password(uri)}")
    return TrackedRun(uri, run_id, info.experiment_id, client)


def ui_command(uri: str) -> str:
    """Return the command that opens the MLflow UI of a store without a server."""
    if not uri.startswith("sqlite:///"):
        return f"mlflow server --backend-store-uri {_without_password(uri)}"
    folder = _sqlite_path(uri).parent
    return "make ui" if folder == Path("runs").absolute() else f"make ui RUNS={folder}"


def git_tags() -> dict[str, str]:
    """Return ``git.commit`` and ``git.dirty`` of this checkout, "unknown" outside of one, e.g. in a submitted job."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # A copy inside another repository must not get that repository's commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            dirty = "true" if git("status", "--porcelain") else "false"
            return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        pass
    return {"git.commit": "unknown", "git.dirty": "unknown"}


# --- opening a store


def _connect(uri: str) -> MlflowClient:
    """Open a client. The URI is checked first, since MLflow retries a wrong one silently for minutes."""
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]  # postgresql+psycopg names a driver
    if scheme not in SERVER_SCHEMES + DATABASE_SCHEMES:
        known = ", ".join(f"{name}://" for name in SERVER_SCHEMES + DATABASE_SCHEMES)
        raise ConfigError(f"tracking.uri: '{_without_password(uri)}' does not begin with one of {known}")
    if scheme in ("http", "https"):
        check_server(uri, _without_password(uri))
    try:
        if scheme != "sqlite":
            return MlflowClient(uri, uri)
        _check_sqlite(uri)
        with _lock(uri):  # concurrent migrations of a fresh database fail
            return MlflowClient(uri, uri)
    except ConfigError:
        raise
    except Exception as error:  # MLflow lets SQLAlchemy's and the drivers' errors through
        raise ConfigError(f"tracking.uri: cannot open {_without_password(uri)} ({first_line(error)})") from error


def _sqlite_path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri.replace("sqlite:///", "sqlite:", 1)).path))


def _check_sqlite(uri: str) -> None:
    path = _sqlite_path(uri)
    if not uri.startswith("sqlite:///") or path.name in ("", ":memory:"):
        raise ConfigError(f"tracking.uri: '{uri}' names no file; write sqlite:///path/of/mlflow.db")
    if not path.parent.is_dir():
        raise ConfigError(f"tracking.uri: the folder {path.parent} of {uri} does not exist")
    try:
        with path.open("rb") as file:
            header = file.read(16)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"tracking.uri: cannot read {path}: {error.strerror}") from error
    if header and header != b"SQLite format 3\0":
        raise ConfigError(f"tracking.uri: {path} is not an SQLite database")


@contextmanager
def _lock(uri: str) -> Iterator[None]:
    """Hold the file lock of an SQLite store. Other stores handle concurrency themselves."""
    if not uri.startswith("sqlite:"):
        yield
        return
    path = _sqlite_path(uri)
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes
        yield


def _experiment(client: MlflowClient, uri: str, name: str, folder: Path) -> str:
    """Return the id of the experiment ``name``; create it if it does not exist."""
    try:
        found = client.get_experiment_by_name(name)
        if found is None:
            # A server has its own artifact location; a bare database would use the current folder.
            local = urlsplit(uri).scheme not in SERVER_SCHEMES
            try:
                location = (folder / "mlartifacts").as_uri() if local else None
                return client.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)  # another process created it first
    except MlflowException as error:
        raise ConfigError(f"tracking.experiment: cannot open '{name}' ({first_line(error)})") from error
    if found is None or found.lifecycle_stage != "active":
        raise ConfigError(f"tracking.experiment: '{name}' was deleted; restore it or choose another name")
    return found.experiment_id


# --- helpers


def _params(recipe: Recipe) -> dict[str, str]:
    """Return the recipe as MLflow parameters: dotted keys, text values."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, item)
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            for i, item in enumerate(value):
                yield from walk(f"{prefix}.{i}", item)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield prefix, text[:MAX_PARAM_VAL_LENGTH]  # truncated by MLflow, a value would look changed when resuming

    return dict(walk("", recipe.to_dict()))


def _slices(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
