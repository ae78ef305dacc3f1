"""Filler text for generated documents, without the characters reserved for facts."""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from evals.documents.retrieval import RESERVED
from model.errors import DataError
from model.tokenizer import Tokenizer, load_tokenizer

_RESERVED_CHARACTER = re.compile(f"[{re.escape(RESERVED)}]")


def read_filler(data: str | None, characters: int) -> str:
    """Return about ``characters`` characters of real text.

    The source is the validation split of the prepared data folder ``data``, or the standard library's source files if
    ``data`` is None. Raises DataError for missing or damaged token shards.
    """
    parts, size = [], 0
    for text in _validation_texts(Path(data)) if data is not None else _standard_library():
        part = _RESERVED_CHARACTER.sub("", text)
        parts.append(part)
        size += len(part)
        if size >= characters:
            break
    return "".join(parts)


def sample_filler(rng: random.Random, tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    """Return at least ``length`` tokens from a random position of ``text``. Raises DataError if it is too short."""
    characters = length
    while True:
        if characters > len(text):
            raise DataError(f"filler: {len(text)} characters of text are too few for documents of {length} tokens")
        start = rng.randrange(len(text) - characters + 1)
        tokens = tokenizer.encode(text[start : start + characters])
        if len(tokens) >= length:
            return tokens
        characters *= 2  # a token has several characters


def _validation_texts(folder: Path) -> Iterator[str]:
    shards = sorted((folder / "validation").glob("*.parquet"))
    if not shards:
        raise DataError(f"{folder}: no validation shards found; run the prepare step first")
    tokenizer = load_tokenizer(folder)
    for path in shards:
        try:
            with pq.ParquetFile(path) as file:
                for column in ("kind", "tokens"):
                    if column not in file.schema_arrow.names:
                        raise DataError(f"{path}: not a token shard, because column '{column}' is missing")
                for batch in file.iter_batches(columns=["kind", "tokens"], batch_size=256):
                    for row in batch.to_pylist():
                        if row["kind"] == "text":
                            yield tokenizer.decode(row["tokens"])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: damaged token shard ({' '.join(str(error).split())})") from error


def _standard_library() -> Iterator[str]:
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        yield path.read_text(encoding="utf-8", errors="ignore")
