"""The models of a recipe's ``serve`` section: their names, checkpoint folders and versions of the registry."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.errors import ConfigError
from pipelines.recipe.paths import MODEL_URI
from pipelines.recipe.schema import Recipe, ServeSection
from pipelines.tracking.mlflow_store import Tracking, open_tracking
from pipelines.tracking.registry import download, find_version


@dataclass(frozen=True)
class DeployedModel:
    """A model that is served."""

    name: str
    """Name that clients use."""
    uri: str
    key: str
    """The recipe's key of the URI, for error messages."""
    checkpoint: Path
    version: str | None = None
    """Version of the registry; None for a checkpoint folder."""


def name_in(uri: str) -> str | None:
    """Return the registered name of a model URI, or None for a checkpoint folder."""
    match = MODEL_URI.fullmatch(uri)
    return match["name"] if match else None


def model_sources(section: ServeSection) -> list[tuple[str, str, str]]:
    """Return name, URI and recipe key of each model, the default one first.

    Raises ConfigError for a name used twice.
    """
    uri = section.model_uri
    name = name_in(uri) or "/".join(Path(uri).parts[-2:]).lstrip("/")
    if name in section.models:
        raise ConfigError(f"serve.models: '{name}' is the name of serve.model_uri already")
    others = [(other, uri, f"serve.models.{other}") for other, uri in section.models.items()]
    return [(name, uri, "serve.model_uri"), *others]


class ModelStore:
    """Checkpoint folders of a recipe's models.

    Remote checkpoints, such as those of a tracking server, are copied to ``<run.folder>/served``, which replicas on
    other machines can read. A version is copied once, until its copy is discarded. :meth:`close` removes all copies.
    """

    def __init__(self, recipe: Recipe):
        self._folder = recipe.run.folder / "served"
        self._recipe = recipe
        self._tracking: Tracking | None = None
        self._copies: dict[tuple[str, str | None], tuple[Path, Path]] = {}
        """Folder of a copy and checkpoint folder in it, by name and version of the model."""

    def find(self) -> list[DeployedModel]:
        """Return the models, the default one first. Raises ConfigError for a model that does not exist."""
        return [self._get(*source) for source in model_sources(self._recipe.serve)]

    def newer_version(self, model: DeployedModel, refused: str | None = None) -> DeployedModel | None:
        """Return the version that the alias of ``model`` names now, or None if it is the same one or ``refused``.

        Raises ConfigError if the registry has no answer.
        """
        match = MODEL_URI.fullmatch(model.uri)
        if match is None or match["alias"] is None:
            return None
        number = str(find_version(self._open(), model.uri, model.key).version)
        return None if number in (model.version, refused) else self._get(model.name, model.uri, model.key)

    def discard(self, model: DeployedModel) -> None:
        """Remove the copy of a version, if there is one."""
        self._remove(lambda name, version: (name, version) == (model.name, model.version))

    def discard_others(self, model: DeployedModel) -> None:
        """Remove the copies of other versions of a model."""
        self._remove(lambda name, version: name == model.name and version != model.version)

    def close(self) -> None:
        self._remove(lambda name, version: True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _remove(self, condition: Callable[[str, str | None], bool]) -> None:
        for key in [key for key in self._copies if condition(*key)]:
            shutil.rmtree(self._copies.pop(key)[0], ignore_errors=True)

    def _open(self) -> Tracking:
        self._tracking = self._tracking or open_tracking(self._recipe, write=False, create=False)
        return self._tracking

    def _get(self, name: str, uri: str, key: str) -> DeployedModel:
        if not uri.startswith("models:/"):
            return DeployedModel(name, uri, key, Path(uri))
        tracking = self._open()
        number = str(find_version(tracking, uri, key).version)
        exact = f"models:/{name_in(uri)}/{number}"  # the alias may move meanwhile
        if (name, number) in self._copies:
            return DeployedModel(name, uri, key, self._copies[name, number][1], number)
        copy = self._folder / secrets.token_hex(8)
        try:
            checkpoint = download(tracking, exact, copy, key)
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise
        if checkpoint.is_relative_to(copy):
            self._copies[name, number] = copy, checkpoint
        return DeployedModel(name, uri, key, checkpoint, number)
