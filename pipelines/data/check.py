"""Checks that a recipe matches the data folder it names."""

from __future__ import annotations

import tempfile
from pathlib import Path

from model.errors import ConfigError, DataError
from model.tokenizer import FILE_NAME, Tokenizer, load_tokenizer
from model.wording import quote
from pipelines.data.manifest import Manifest, file_sha256
from pipelines.recipe.messages import naming
from pipelines.recipe.schema import DataSection, Recipe


def check_prepared(recipe: Recipe, manifest: Manifest) -> Recipe:
    """Return ``recipe`` with the vocabulary size of its prepared data, unless ``data.vocabulary`` is ``model``.

    Raises ConfigError naming the first setting that differs from those of the data, and DataError if the tokenizer
    file in the folder is missing or damaged.
    """
    folder, prepared = recipe.data_folder, manifest.settings
    file = folder / FILE_NAME
    if not file.is_file() or file_sha256(file) != prepared["tokenizer_sha256"]:
        raise DataError(f"{file}: missing or damaged; delete the folder and prepare it again")
    for key, value in recipe.data.content().items():
        if value != prepared.get(key):
            raise ConfigError(
                f"data.{key}: {quote(value)}, but {folder} was prepared with {quote(prepared.get(key))}; prepare "
                "under another data.name"
            )
    chosen = recipe.data.bos_token is not None or recipe.data.eos_token is not None
    if recipe.data.tokenizer != manifest.tokenizer or chosen:
        tokenizer = load_data_tokenizer(recipe.data)
        for role, found, expected in (
            ("bos_token", tokenizer.bos_id, manifest.bos_id),
            ("eos_token", tokenizer.eos_id, manifest.eos_id),
        ):
            if found != expected:
                raise ConfigError(
                    f"data.{role}: is ID {found}, but {folder} was prepared with ID {expected}; prepare under another "
                    "data.name"
                )
        if tokenizer_sha256(tokenizer) != prepared["tokenizer_sha256"]:
            raise ConfigError(
                f"data.tokenizer: {recipe.data.tokenizer}, but {folder} was prepared with {manifest.tokenizer}; "
                "prepare under another data.name"
            )
    if recipe.model.window > prepared["window"]:
        raise ConfigError(
            f"model.window: {recipe.model.window} is wider than the {prepared['window']} tokens by which facts in "
            f"{folder} precede their questions; prepare under another data.name"
        )
    if recipe.data.vocabulary == "tokenizer":
        return recipe.model_copy(update={"model": recipe.model.replace(vocab_size=manifest.vocab_size)})
    if recipe.model.vocab_size < manifest.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {recipe.model.vocab_size} is less than the {manifest.vocab_size} token IDs of "
            f"{folder}; raise it, or leave it out to follow the tokenizer"
        )
    return recipe


def load_data_tokenizer(data: DataSection) -> Tokenizer:
    """Return the tokenizer of a recipe. Raises ConfigError."""
    with naming("data.tokenizer", {"bos_token": "data.bos_token", "eos_token": "data.eos_token"}.get):
        return load_tokenizer(data.tokenizer, data.bos_token, data.eos_token)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of the file in which a data folder stores ``tokenizer``."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return file_sha256(Path(folder) / FILE_NAME)
