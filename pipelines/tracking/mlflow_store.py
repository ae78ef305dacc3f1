"""Access to the MLflow tracking store through a client with an explicit URI.

The default store is an SQLite file ``<run.folder>/mlflow.db`` with artifacts in ``<run.folder>/mlartifacts``;
``tracking.uri`` names another database or a tracking server. MLflow's fluent functions are avoided: they keep the URI,
the experiment and the active run in process-wide state and environment variables, which Ray workers would inherit.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import (
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
)

from model.errors import ConfigError
from pipelines.recipe.paths import SQLITE, sqlite_path, sqlite_uri, without_password
from pipelines.recipe.quoting import first_line
from pipelines.recipe.yaml_format import dump_yaml
from pipelines.tracking.connection import (
    DATABASE,
    check_writable,
    connect,
    default_uri,
    lock,
    open_experiment,
)
from pipelines.tracking.lineage import git_tags, source_tags

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipelines.recipe.schema import Recipe

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# Both announce a fresh database on the terminal.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Tracking:
    """An open tracking store and the experiment that holds the runs."""

    uri: str
    experiment_id: str
    client: MlflowClient

    def search_runs(self, filter_string: str = "") -> Iterator[Run]:
        """Yield the experiment's runs that match a filter of MLflow, the newest first."""
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], filter_string, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def is_resumable(self, run_id: str, recipe: Recipe) -> bool:
        """Return whether a run is unfinished and has the recipe's settings. Raises ConfigError if it does not exist."""
        attach(self.uri, run_id)
        run = self.client.get_run(run_id)
        return run.info.status != "FINISHED" and run.data.params == _params(recipe.to_public_dict())

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
        artifact ``config.yaml``, both without the password of ``tracking.uri``. Its tags are ``kind``, MLflow's tags of
        the source and the user, ``git.commit`` and ``git.dirty`` ("unknown" outside git).
        MLflow's parameters are immutable: resuming with a changed recipe replaces ``config.yaml`` and lists the changed
        keys in the tag ``resumed.changed``.
        """
        settings = recipe.to_public_dict()
        params = _params(settings)
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
            git = git_tags()
            tags = {"kind": kind, **git, **source_tags(kind, git)}
            if parent_run_id is not None:
                tags["mlflow.parentRunId"] = parent_run_id
            created = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
            run = TrackedRun(self.uri, created.info.run_id, self.experiment_id, self.client)
            entries = [Param(key, value) for key, value in params.items()]
            for batch in _slices(entries, MAX_PARAMS_TAGS_PER_BATCH):
                self.client.log_batch(run.run_id, params=batch)
        self.client.log_text(run.run_id, dump_yaml(settings), "config.yaml")
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
        self._resumed_step: int | None = None
        """Step of the checkpoint that training was resumed from, if it was."""
        self._repeats: dict[str, Counter[int]] = {}
        """Number of values after that checkpoint that training will repeat, by metric and step."""

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

    def skip_repeated(self, step: int) -> None:
        """Make :meth:`log_step` skip values that were logged before training was resumed from the checkpoint of
        ``step``."""
        self._resumed_step, self._repeats = step, {}

    def log_step(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of a training step. After a rollback, a step has several values."""
        repeated = [name for name in metrics if self._repeats_of(name)[step] > 0]
        self.log_metrics({name: value for name, value in metrics.items() if name not in repeated}, step)
        for name in repeated:  # after logging, which may fail and be tried again
            self._repeats[name][step] -= 1

    def _repeats_of(self, name: str) -> Counter[int]:
        if self._resumed_step is None:
            return Counter()
        if name not in self._repeats:
            self._repeats[name] = Counter(step for step, _ in self.history(name) if step > self._resumed_step)
        return self._repeats[name]

    def log_event(self, step: int, message: str) -> None:
        """Append a message about ``step`` to the tag ``event.<step>``."""
        key = f"event.{step:06d}"
        logged = self._client.get_run(self.run_id).data.tags.get(key)
        if logged is None or message not in logged:  # a resumed run repeats events
            self.set_tags({key: message if logged is None else f"{logged}; {message}"})

    def metrics(self) -> dict[str, float]:
        """Return the last value of every metric."""
        return dict(self._client.get_run(self.run_id).data.metrics)

    def history(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of every value logged for a metric."""
        return [(entry.step, entry.value) for entry in self._client.get_metric_history(self.run_id, name)]

    def log_dataset(self, dataset: DatasetInput) -> None:
        """Store a data set as an input of the run. Repeating it changes nothing."""
        self._client.log_inputs(self.run_id, datasets=[dataset])

    def start_time(self) -> float:
        """Return when the run began, in seconds since 1970."""
        return self._client.get_run(self.run_id).info.start_time / 1000

    def log_artifact(self, path: Path) -> None:
        """Copy a local file to the artifacts."""
        self._client.log_artifact(self.run_id, str(path))

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
            return without_password(self.uri).rstrip("/") + page
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


def open_tracking(recipe: Recipe, write: bool = True, create: bool = True, needed: str = "the train step") -> Tracking:
    """Open the tracking store of ``recipe``; create its database and experiment on first use.

    Safe to call from several processes at once. Raises ConfigError if the URI cannot be opened; with ``write``, if the
    store is read-only; without ``create``, if the SQLite database does not exist, with the steps ``needed`` to fill it.
    """
    folder = recipe.run.folder.absolute()
    uri = recipe.tracking.uri
    if uri is None:
        uri = default_uri(folder)
        try:
            if create:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.folder: cannot create {folder}: {error.strerror}") from error
    elif uri.startswith(SQLITE):
        # Workers run in their own folders, so a URI sent to them must hold an absolute path.
        uri = sqlite_uri(sqlite_path(uri).absolute())
    if write:  # first: connecting names tracking.uri in its errors
        check_writable(uri, store_key(recipe))
    client = connect(uri, create, f"run {needed} first, or name its place with run.folder or tracking.uri")
    with lock(uri):
        return Tracking(uri, open_experiment(client, uri, recipe.tracking.experiment, folder), client)


def store_key(recipe: Recipe) -> str:
    """Return the key of the setting that names the tracking store."""
    return "run.folder" if recipe.tracking.uri is None else "tracking.uri"


def attach(uri: str, run_id: str) -> TrackedRun:
    """Return an existing run, e.g. in a Ray worker. Raises ConfigError if there is none."""
    client = connect(uri, create=False)
    try:
        info = client.get_run(run_id).info
    except MlflowException as error:
        raise ConfigError(
            f"run {run_id}: not found in {without_password(uri)} ({first_line(error)}); if its folder was moved here, "
            "move its whole runs folder instead, or delete the run.json in it"
        ) from error
    if info.lifecycle_stage != "active":
        raise ConfigError(f"run {run_id}: was deleted from {without_password(uri)}")
    return TrackedRun(uri, run_id, info.experiment_id, client)


def ui_command(uri: str) -> str:
    """Return the command that opens the MLflow UI of a store without a server."""
    if not uri.startswith(SQLITE):
        return f"mlflow server --backend-store-uri {shlex.quote(without_password(uri))}"
    database = sqlite_path(uri)
    if database.name != DATABASE:
        return f"mlflow server --backend-store-uri {shlex.quote(uri)}"
    runs = str(database.parent)
    # Make expands $ in variables given on its command line.
    return (
        "make ui"
        if runs == str(Path("runs").absolute())
        else shlex.join(["make", "ui", f"RUNS={runs}".replace("$", "$$")])
    )


def _params(settings: dict[str, Any]) -> dict[str, str]:
    """Return a recipe's settings as MLflow parameters: dotted keys, text values."""

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

    return dict(walk("", settings))


def _slices(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
