"""A recipe and the data folder that it names: prepared with its settings, or refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

from model.errors import ConfigError, DataError
from model.tokenizer import FILE_NAME, load_tokenizer
from pipelines.data.packing import Manifest, file_sha256
from pipelines.recipe.schema import Recipe


def fit_to_data(recipe: Recipe, manifest: Manifest) -> Recipe:
    """The recipe with the vocabulary of its prepared data.

    Raises ConfigError naming the first setting that they were not prepared with, DataError where the tokenizer's file
    is not theirs.
    """
    folder, found = recipe.data_folder, manifest.settings
    file = folder / FILE_NAME
    if not file.is_file() or file_sha256(file) != found["tokenizer_sha256"]:
        raise DataError(f"{file}: missing or damaged; delete the folder and prepare it again")
    for key, value in recipe.data.content().items():
        if value != found.get(key):
            raise ConfigError(
                f"data.{key}: {value}, but {folder} was prepared with {found.get(key)}; prepare under another data.name"
            )
    if recipe.data.tokenizer != manifest.tokenizer and _sha256(recipe.data.tokenizer) != found["tokenizer_sha256"]:
        raise ConfigError(
            f"data.tokenizer: {recipe.data.tokenizer}, but {folder} was prepared with {manifest.tokenizer}; prepare "
            "under another data.name"
        )
    if recipe.model.window > found["window"]:
        raise ConfigError(
            f"model.window: {recipe.model.window} is wider than the {found['window']} tokens that facts in {folder} "
            "keep away from their questions; prepare under another data.name"
        )
    return recipe.model_copy(update={"model": recipe.model.replace(vocab_size=manifest.vocab_size)})


def _sha256(tokenizer: str) -> str:
    """Of the file that ``prepare`` leaves with the shards."""
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(tokenizer).save(folder)
        return file_sha256(Path(folder) / FILE_NAME)
