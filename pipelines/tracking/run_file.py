"""``run.json``: the MLflow run that a run folder belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from model.atomic_files import write_text
from model.errors import MALFORMED, ConfigError
from pipelines.recipe.paths import SQLITE, sqlite_path, sqlite_uri

RUN_FILE = "run.json"


class RunReference(NamedTuple):
    """The content of ``run.json``."""

    run_id: str
    tracking_uri: str


def read_run_file(folder: Path) -> RunReference | None:
    """Return the MLflow run of a run folder, or None without ``run.json``. Raises ConfigError if it is damaged."""
    path = folder / RUN_FILE
    try:
        content = json.loads(path.read_text())
        run_id, uri = content["run_id"], content["tracking_uri"]
        if uri.startswith(SQLITE):
            uri = sqlite_uri(os.path.normpath(folder.absolute() / sqlite_path(uri)))
        return RunReference(run_id, uri)
    except FileNotFoundError:
        return None
    except MALFORMED as error:
        raise ConfigError(f"{path}: expected JSON with run_id and tracking_uri ({error})") from error


def write_run_file(folder: Path, reference: RunReference) -> None:
    """Store the MLflow run of a run folder in ``run.json``.

    The database of the runs folder that holds ``folder`` is stored with a relative path, so that the runs folder can be
    moved.
    """
    run_id, uri = reference
    if uri.startswith(SQLITE):
        database = sqlite_path(uri)
        if database.parent in folder.absolute().parents:
            uri = sqlite_uri(os.path.relpath(database, folder.absolute()))
    write_text(folder / RUN_FILE, json.dumps({"run_id": run_id, "tracking_uri": uri}) + "\n")
