"""Tokenize text into Parquet shards, with generated retrieval documents mixed in.

Equal input and settings give equal bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from model.atomic_files import atomic_folder
from model.errors import ConfigError, DataError
from model.tokenizer import Tokenizer
from model.wording import count, quote
from pipelines.data.check import load_data_tokenizer, tokenizer_sha256
from pipelines.data.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, read_manifest
from pipelines.data.retrieval_rows import RetrievalGenerator
from pipelines.data.shard_writer import write_splits
from pipelines.data.source_files import SourceFile, find_files
from pipelines.recipe.paths import check_creatable
from pipelines.recipe.schema import Recipe
from pipelines.reports.counting import format_bytes
from pipelines.steps import Step
from serve.api.chat_template import ChatTemplate


@dataclass(frozen=True)
class PrepareResult:
    folder: Path
    manifest: Manifest
    reused: bool
    """True if the folder already existed, complete and prepared with equal settings."""


def run(recipe: Recipe) -> PrepareResult:
    """Write ``recipe.data_folder``, or reuse it if it was prepared with equal settings.

    Raises DataError or ConfigError. On failure, existing files are untouched and no partial folder is left behind.
    """
    data, folder = recipe.data, recipe.data_folder
    tokenizer = load_data_tokenizer(data)
    _check_chat_template(tokenizer)
    files = find_files(data.sources, data.seed)
    RetrievalGenerator(recipe, tokenizer, "train").check()
    settings = _settings(recipe, files, tokenizer)
    try:
        reused = _holds_files(folder)
        manifest = _read_existing(folder, settings, tokenizer) if reused else None
    except OSError as error:
        raise DataError(f"run.folder: {folder} cannot be read ({error.strerror or error})") from error
    if manifest is None:
        check_creatable(folder, "run.folder")
        try:
            manifest = _write(recipe, files, tokenizer, settings)
        except OSError as error:
            raise DataError(f"run.folder: {folder} cannot be written ({error.strerror or error})") from error
    result = PrepareResult(folder, manifest, reused)
    _print_summary(result)
    return result


def _check_chat_template(tokenizer: Tokenizer) -> None:
    """Raise ConfigError for a chat template that the server would refuse after the training."""
    try:
        ChatTemplate(tokenizer)
    except ConfigError as error:
        raise ConfigError(f"data.tokenizer: {error}; correct or remove the template") from error


def _holds_files(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _write(recipe: Recipe, files: list[SourceFile], tokenizer: Tokenizer, settings: dict[str, object]) -> Manifest:
    data, folder = recipe.data, recipe.data_folder
    with atomic_folder(folder) as scratch:
        tokenizer.save(scratch)
        held_out, splits = write_splits(recipe, tokenizer, files, scratch)
        manifest = Manifest(
            format=FORMAT_VERSION,
            settings=settings,
            tokenizer=data.tokenizer,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            sequence_length=data.sequence_length,
            packing=data.packing,
            held_out=held_out,
            splits=splits,
        )
        (scratch / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n")
        if _holds_files(folder):
            raise DataError(f"{folder}: was written by another process in the meantime; run the prepare step again")
    return manifest


def _settings(recipe: Recipe, files: list[SourceFile], tokenizer: Tokenizer) -> dict[str, object]:
    """Return all settings that determine the shards' content as plain JSON values; sources by name and size."""
    sizes = hashlib.sha256()
    for file in files:
        sizes.update(f"{file.name}\0{file.bytes}\n".encode())
    return {
        **recipe.data.content(),
        "window": recipe.model.window,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "files": len(files),
        "files_sha256": sizes.hexdigest(),
    }


def _read_existing(folder: Path, settings: dict[str, object], tokenizer: Tokenizer) -> Manifest:
    """Return the manifest of an existing folder. Raises DataError unless it is intact and has ``settings`` and the
    tokenizer's BOS and EOS."""
    advice = "choose another data.name or delete the folder"
    if not (folder / MANIFEST_NAME).exists():
        raise DataError(f"{folder}: exists and holds no {MANIFEST_NAME}; {advice}")
    try:
        manifest = read_manifest(folder, verify=True)
    except DataError as error:
        raise DataError(f"{error}; {advice}") from error
    settings = {**settings, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    found = {**manifest.settings, "bos_id": manifest.bos_id, "eos_id": manifest.eos_id}
    changed = [key for key in {**settings, **found} if settings.get(key) != found.get(key)]
    if changed == ["files_sha256"]:
        raise DataError(f"{folder}: was prepared when the source files had other sizes; {advice}")
    if changed:
        listed = ", ".join(
            f"{key} {quote(found.get(key))} there and {quote(settings.get(key))} here"
            for key in changed
            if key != "files_sha256"
        )
        raise DataError(f"{folder}: was prepared with other settings ({listed}); {advice}")
    return manifest


def _print_summary(result: PrepareResult) -> None:
    print(f"{'Reusing' if result.reused else 'Wrote'} token shards in {result.folder}")
    if result.manifest.held_out == "ends":
        print("  too few documents to hold out whole ones: validation is the end of each document")
    for split, part in result.manifest.splits.items():
        length = result.manifest.sequence_length
        rows = ", ".join(
            f"{number:,} {kind}" + (f" ({part.targets[kind] / (number * length):.1%} full)" if number else "")
            for kind, number in part.rows.items()
        )
        text = format_bytes(part.text_bytes, digits=1)
        print(
            f"  {split}: {count(part.documents['text'], 'document')} ({text} of text), "
            f"rows of {length} tokens: {rows}, in {count(len(part.shards), 'shard')}"
        )


STEP = Step(run)
