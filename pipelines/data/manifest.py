"""The manifest of a data folder, and the checks that the folder matches it.

A data folder holds ``manifest.json``, ``tokenizer.json`` and token shards ``{train,validation}/*.parquet``
(:mod:`pipelines.data.shards`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator

from evals.documents import RETRIEVAL_TASKS
from model.errors import DataError
from model.tokenizer.hugging_face import MAX_TOKEN_ID
from model.validation import sentence
from pipelines.recipe.section import MAX_LENGTH

Split = Literal["train", "validation"]
Kind = str
"""``text``, or the name of the retrieval task that generated a document."""
HeldOut = Literal["documents", "ends"]
"""Content of the validation split: whole documents, or the end of each document."""

SPLITS: tuple[Split, ...] = ("train", "validation")
KINDS: tuple[Kind, ...] = ("text", *RETRIEVAL_TASKS)
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Record):
    file: str
    """Relative to the data folder."""
    bytes: int
    sha256: str
    documents: int
    tokens: int


class SplitManifest(_Record):
    text_bytes: int
    """UTF-8 bytes of source text."""
    documents: dict[Kind, int]
    rows: dict[Kind, int]
    """Training rows at the manifest's ``sequence_length``."""
    tokens: dict[Kind, int]
    targets: dict[Kind, int]
    """Predicted tokens: all but the first of every document or piece."""
    shards: tuple[Shard, ...]


class Manifest(_Record):
    """The content of ``manifest.json``."""

    format: int
    settings: dict[str, Any]
    """All settings that determine the shards' content."""
    tokenizer: str
    vocab_size: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID + 1)]
    bos_id: int
    eos_id: int
    sequence_length: Annotated[int, Field(ge=1, le=MAX_LENGTH)]
    packing: bool
    """True if a row may hold several short documents."""
    held_out: HeldOut = "documents"
    splits: dict[Split, SplitManifest]

    @field_validator("settings")
    @classmethod
    def _check_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for name, kind in (("window", int), ("tokenizer_sha256", str)):
            if not isinstance(settings.get(name), kind):
                raise ValueError(f"{name} is missing or not of type {kind.__name__}")
        return settings


class _FormatVersion(BaseModel):
    """The part of a manifest that all versions share."""

    format: int


def read_manifest(folder: str | Path, verify: bool = False) -> Manifest:
    """Read the manifest of a data folder and check that every shard exists and has its size.

    ``verify`` also checks their SHA-256. Raises DataError naming the missing or damaged file.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        advice = "run the prepare step first, or correct run.folder or data.name"
        raise DataError(f"{path}: {error.strerror}; {advice}") from error
    try:
        version = _FormatVersion.model_validate_json(content).format
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: has format {version}, this version reads format {FORMAT_VERSION}")
        manifest = Manifest.model_validate_json(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key, reason = ".".join(str(part) for part in first["loc"]), sentence(first)
        raise DataError(f"{path}: damaged manifest ({f'{key}: ' if key else ''}{reason})") from error
    for split in SPLITS:
        if split not in manifest.splits:
            raise DataError(f"{path}: damaged manifest (no '{split}' split)")
        for shard in manifest.splits[split].shards:
            _check_shard(folder / shard.file, shard, verify)
    return manifest


def _check_shard(path: Path, shard: Shard, verify: bool) -> None:
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise DataError(f"{path}: damaged token shard (has {size} bytes, the manifest says {shard.bytes})")
        if verify and file_sha256(path) != shard.sha256:
            raise DataError(f"{path}: damaged token shard (its SHA-256 differs from the manifest)")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
