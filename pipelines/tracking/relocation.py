"""Paths in an SQLite store whose folder was moved or copied.

MLflow stores absolute locations of all artifacts. After a move they name a folder that is gone; in a copy, they name
the original. :func:`update_paths` reads the old place of the database from them and replaces it with the new one.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from model.errors import ConfigError
from pipelines.recipe.paths import SQLITE, sqlite_path, sqlite_uri
from pipelines.tracking.run_file import RUN_FILE, RunReference, read_run_file, write_run_file

ARTIFACTS = "mlartifacts"
"""Folder of the artifacts, next to the database."""
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns with artifact locations."""
_TIMEOUT_SECONDS = 30.0


def set_default_artifact_location(database: Path) -> None:
    """Let the experiment ``Default`` of a new database keep its artifacts next to it, not in the current folder."""
    with closing(sqlite3.connect(database, timeout=_TIMEOUT_SECONDS)) as connection, connection:
        location = (database.parent / ARTIFACTS).as_uri()
        connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", (location,))


def update_paths(database: Path) -> None:
    """Replace stored locations below the folder that held the database before; print where it was.

    A folder reached by another path, such as a symbolic link, counts as the same. Raises ConfigError if the artifacts
    were left behind or the database cannot be written to.
    """
    database = database.absolute()
    folder = database.parent
    with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
        stored = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        in_use = connection.execute("SELECT EXISTS (SELECT 1 FROM runs)").fetchone()[0]
    stale = [location for (location,) in stored if _is_stale(location, folder / ARTIFACTS)]
    if not stale:
        return
    before = Path(local_file_uri_to_path(stale[0])).parent
    if in_use and not (folder / ARTIFACTS).is_dir():
        raise ConfigError(
            f"{folder}: was moved or copied from {before} without its artifacts; move {before / ARTIFACTS} to "
            f"{folder / ARTIFACTS}, or move {database.name} back"
        )
    try:
        # The database comes last: as long as it is stale, an interrupted update is repeated.
        for location in stale:
            _update_run_files(folder, Path(local_file_uri_to_path(location)).parent)
        with closing(sqlite3.connect(database, timeout=_TIMEOUT_SECONDS)) as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            for location in stale:
                _replace(connection, location, folder)
    except (sqlite3.OperationalError, OSError) as error:
        raise ConfigError(
            f"{folder}: was moved or copied from {before}, and the paths stored in {database.name} cannot be updated "
            f"({error}); make the folder writable"
        ) from error
    print(f"{folder}: was moved or copied from {before}; updated the paths stored in {database.name}", flush=True)


def _is_stale(location: str, artifacts: Path) -> bool:
    """Return whether a location names another ``mlartifacts`` folder than ``artifacts``."""
    if not location or not is_local_uri(location):
        return False
    path = Path(local_file_uri_to_path(location))
    if path.name != ARTIFACTS or path == artifacts:
        return False
    try:
        return not path.samefile(artifacts)
    except OSError:
        return True


def _replace(connection: sqlite3.Connection, location: str, folder: Path) -> None:
    before = str(Path(local_file_uri_to_path(location)).parent)
    prefixes = [(table, column, "1", location, (folder / ARTIFACTS).as_uri()) for table, column in _LOCATIONS]
    prefixes.append(("tags", "value", "key = 'checkpoint'", before, str(folder)))
    for table, column, condition, old, new in prefixes:
        connection.execute(
            f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
            f"WHERE {condition} AND ({column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/')",
            {"old": old, "new": new},
        )
    sources = [json.dumps(f"{path}/")[:-1] for path in (before, str(folder))]
    connection.execute("UPDATE datasets SET dataset_source = replace(dataset_source, ?, ?)", sources)


def _update_run_files(folder: Path, before: Path) -> None:
    """Replace the path of the database in run folders that store it as an absolute one."""
    for path in (*folder.glob(f"*/{RUN_FILE}"), *folder.glob(f"sweeps/*/{RUN_FILE}")):
        try:
            reference = read_run_file(path.parent)
        except ConfigError:
            continue  # the step that needs it names the damage
        if reference is None or not reference.tracking_uri.startswith(SQLITE):
            continue
        stored = sqlite_path(reference.tracking_uri)
        if stored.is_relative_to(before):
            uri = sqlite_uri(folder / stored.relative_to(before))
            write_run_file(path.parent, RunReference(reference.run_id, uri))
