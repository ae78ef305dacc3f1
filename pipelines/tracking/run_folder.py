"""A run's folder: whose it is, with which settings it was begun, and which MLflow run belongs to it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from model.errors import ConfigError
from model.files import write_text
from pipelines.data.packing import MANIFEST_NAME
from pipelines.recipe.schema import Recipe
from pipelines.tracking.mlflow_store import TrackedRun

RECIPE, RUN, LOCK = "recipe.json", "run.json", "lock"
SETTINGS_OF_A_TRAINING = ("data", "model", "train")
"""Sections that a resumed training must not change."""
_MAY_CHANGE = {
    f"train.{name}"
    for name in (
        *("workers", "sharding", "cpus_per_worker", "threads_per_worker", "use_gpu", "max_failures"),
        *("log_every", "keep_checkpoints", "recompute"),
    )
}
"""How the work is shared out, and what is kept of it. Another number of workers deals out an epoch's rows anew."""


@contextmanager
def claimed(folder: Path, recipe: Recipe, sections: tuple[str, ...], what: str) -> Iterator[str | None]:
    """Have a run folder for this recipe throughout the block. ``what`` names the key of its name.

    Yields the MLflow run to go on with, None for a new one. Raises ConfigError where another process has the folder, or
    where it was begun with another seed or other settings in ``sections``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
        except BlockingIOError:
            raise ConfigError(
                f"{what}: another process works on '{folder.name}'; wait for it, or choose another {what}"
            ) from None
        _check_settings(folder, recipe, sections, what)
        yield _mlflow_run(folder)


def write_run_file(folder: Path, tracked: TrackedRun) -> None:
    """Leave word in a run folder of the MLflow run that belongs to it."""
    content = {"run_id": tracked.run_id, "tracking_uri": tracked.uri}
    write_text(folder / RUN, json.dumps(content) + "\n")


def write_settings(folder: Path, recipe: Recipe, sections: tuple[str, ...]) -> None:
    """Bind a run folder to this recipe's ``sections``, seed and data."""
    write_text(folder / RECIPE, json.dumps(_settings(recipe, sections), indent=2) + "\n")


def _settings(recipe: Recipe, sections: tuple[str, ...]) -> dict[str, Any]:
    settings = {name: value for name, value in recipe.to_dict().items() if name in sections}
    settings["run"] = {"seed": recipe.run.seed}
    settings["data"]["manifest"] = sha256((recipe.data_folder / MANIFEST_NAME).read_bytes()).hexdigest()
    return settings


def _check_settings(folder: Path, recipe: Recipe, sections: tuple[str, ...], what: str) -> None:
    path = folder / RECIPE
    if not path.exists():
        write_settings(folder, recipe, sections)
        return
    try:
        earlier = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({error}); delete the run folder or choose another {what}") from error
    differing = _flat(earlier).items() ^ _flat(_settings(recipe, sections)).items()
    changed = sorted({key for key, _ in differing} - _MAY_CHANGE)
    if changed:
        raise ConfigError(
            f"{what}: '{folder.name}' was begun with another {', '.join(changed)}; choose another {what}, or delete "
            f"{folder} to begin again"
        )


def _mlflow_run(folder: Path) -> str | None:
    try:
        return json.loads((folder / RUN).read_text())["run_id"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / RUN}: damaged ({error}); delete the run folder to begin again") from error


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}".strip(".")).items()}
    return {prefix: json.dumps(value)}
