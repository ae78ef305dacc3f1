"""The folder of a run: its lock, the settings it was started with, and the MLflow run it belongs to."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from model.atomic_files import write_text
from model.errors import MALFORMED, ConfigError
from pipelines.data.manifest import MANIFEST_NAME
from pipelines.recipe.schema import Recipe
from pipelines.tracking.connection import DATABASE, connect, default_uri
from pipelines.tracking.mlflow_store import TrackedRun, attach
from pipelines.tracking.run_file import RUN_FILE, RunReference, read_run_file, write_run_file

RECIPE_FILE, LOCK_FILE = "recipe.json", "lock"
_MAX_VALUE_CHARS = 40  # longest value shown in a message
TRAINING_SECTIONS = ("data", "model", "train")
"""Recipe sections that a resumed training must not change."""
_MAY_CHANGE = {
    *("data.name", "data.sources", "data.tokenizer", "data.bos_token", "data.eos_token"),
    "data.vocabulary",  # model.vocab_size is compared
    *("train.workers", "train.sharding", "train.cpus_per_worker", "train.threads_per_worker", "train.use_gpu"),
    *("train.max_failures", "train.log_every", "train.keep_checkpoints", "train.recompute"),
}
"""Settings that a resumed run may change: data settings whose content the manifest's hash covers, and settings of
parallelism and logging. A different number of workers redistributes an epoch's rows."""


@contextmanager
def lock_run_folder(folder: Path, recipe: Recipe, sections: tuple[str, ...], key: str) -> Iterator[str | None]:
    """Hold an exclusive lock on a run folder, and check that the recipe matches the one it was started with.

    Yield the id of the MLflow run to resume, or None. Raises ConfigError if another process holds the folder, or if it
    was started with another seed or other settings in ``sections``.

    Args:
        key: The recipe key that names the folder, for error messages.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = "is not a folder" if folder.exists() else f"cannot be created ({error.strerror})"
        raise ConfigError(f"{key}: {folder} {problem}") from None
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
        except BlockingIOError:
            raise ConfigError(
                f"{key}: another process works on '{folder.name}'; wait for it, or choose another {key}"
            ) from None
        _check_settings(folder, recipe, sections, key)
        try:
            reference = read_run_file(folder)
        except ConfigError as error:
            raise ConfigError(f"{error}; delete the run folder to begin again") from error
        yield None if reference is None else reference.run_id


def bind(folder: Path, tracked: TrackedRun) -> None:
    """Store the MLflow run of a run folder."""
    write_run_file(folder, RunReference(tracked.run_id, tracked.uri))


def run_of_checkpoint(checkpoint: Path) -> TrackedRun | None:
    """Return the MLflow run that trained a checkpoint, from ``run.json`` next to its folder.

    None without that file, as for an imported checkpoint. Raises ConfigError if it names no run.
    """
    folder = checkpoint.parent
    if not (folder / RUN_FILE).exists() and (checkpoint.resolve().parent / RUN_FILE).exists():
        folder = checkpoint.resolve().parent  # a link to a checkpoint
    for runs in folder.parents[:2]:  # the runs folder of a run, and of a sweep
        if (runs / DATABASE).is_file():
            connect(default_uri(runs))  # updates run.json if the folder was moved
    try:
        reference = read_run_file(folder)
    except OSError as error:
        raise ConfigError(f"{folder / RUN_FILE}: {error.strerror}, so the run of {checkpoint} is unknown") from error
    return None if reference is None else attach(reference.tracking_uri, reference.run_id)


def find_checkpoint(runs: Path, run_id: str, recorded: Path) -> Path | None:
    """Return the folder of a run's final checkpoint in a runs folder, or None if it is elsewhere.

    That is the folder ``recorded`` when the run ended, or the one that belongs to the run now, if its run folder was
    renamed or moved into this runs folder.
    """
    renamed = (path.parent / recorded.name for path in sorted(runs.glob(f"*/{RUN_FILE}")))
    here = runs / recorded.parent.name / recorded.name
    inside = recorded.is_relative_to(runs) or recorded.resolve().is_relative_to(runs.resolve())
    for checkpoint in (*([recorded] if inside else []), here, *renamed):
        if checkpoint.is_dir() and owner(checkpoint) == run_id:
            return checkpoint
    return recorded if inside else None


def owner(checkpoint: Path) -> str | None:
    """Return the id of the run that a checkpoint belongs to, or None if it is unknown."""
    try:
        reference = read_run_file(checkpoint.parent)
    except (ConfigError, OSError):
        return None
    return None if reference is None else reference.run_id


def write_settings(folder: Path, recipe: Recipe, sections: tuple[str, ...]) -> None:
    """Bind a run folder to the recipe's ``sections``, seed and data."""
    write_text(folder / RECIPE_FILE, json.dumps(_settings(recipe, sections), indent=2) + "\n")


def training_identity(recipe: Recipe) -> str:
    """Return a hash of everything that determines a training's result: sections, seed and data."""
    settings = _flatten(_settings(recipe, TRAINING_SECTIONS))
    kept = {key: value for key, value in settings.items() if key not in _MAY_CHANGE}
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _settings(recipe: Recipe, sections: tuple[str, ...]) -> dict[str, Any]:
    settings = {name: value for name, value in recipe.to_dict().items() if name in sections}
    settings["run"] = {"seed": recipe.run.seed}
    settings["data"]["manifest"] = sha256((recipe.data_folder / MANIFEST_NAME).read_bytes()).hexdigest()
    return _without_folder(settings, recipe.run.folder)


def _without_folder(value: Any, folder: Path) -> Any:
    """Replace paths in the runs folder by ``<run.folder>/...``, so that a moved folder keeps its settings."""
    if isinstance(value, dict):
        return {key: _without_folder(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folder(item, folder) for item in value]
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(folder):
        return f"<run.folder>/{Path(value).relative_to(folder)}"
    return value


def _check_settings(folder: Path, recipe: Recipe, sections: tuple[str, ...], key: str) -> None:
    path = folder / RECIPE_FILE
    if not path.exists():
        write_settings(folder, recipe, sections)
        return
    try:
        earlier = _flatten(_without_folder(json.loads(path.read_text()), recipe.run.folder))
    except MALFORMED as error:
        raise ConfigError(f"{path}: damaged ({error}); delete the run folder or choose another {key}") from error
    now = _flatten(_settings(recipe, sections))
    changed = sorted({name for name, _ in earlier.items() ^ now.items()} - _MAY_CHANGE)
    if changed:
        described = [name + _values(earlier.get(name), now.get(name)) for name in changed]
        raise ConfigError(
            f"{key}: '{folder.name}' was started with another {', '.join(described)}; choose another {key}, or "
            f"delete {folder} to start over"
        )


def _values(earlier: str | None, now: str | None) -> str:
    """Return both values of a changed setting in parentheses, or nothing if one is missing or long."""
    if earlier is None or now is None or max(len(earlier), len(now)) > _MAX_VALUE_CHARS:
        return ""
    return f" ({earlier}, found {now})"


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}.{key}".strip(".")).items()}
    return {prefix: json.dumps(value)}
