"""Parquet token shards: one row per document, or per numbered piece of a long one.

Readers treat each piece as a document. ``tokens`` begin with BOS; ``answer_starts`` and ``answer_ends`` are the token
spans [start, end) of a retrieval document's answers, empty for text.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.errors import DataError

SHARD_SCHEMA = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("piece", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("answer_starts", pa.list_(pa.int32()), nullable=False),
        pa.field("answer_ends", pa.list_(pa.int32()), nullable=False),
    ]
)
READ_COLUMNS = ["kind", "tokens", "answer_starts", "answer_ends"]


def read_shard(path: Path, vocab_size: int) -> pa.Table:
    """Read the documents of a shard. Raises DataError naming a damaged file."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            documents = file.read(columns=READ_COLUMNS, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged token shard ({' '.join(str(error).split())})") from error
    for name in READ_COLUMNS:
        expected = SHARD_SCHEMA.field(name).type
        if name not in documents.column_names or documents.schema.field(name).type != expected:
            raise DataError(f"{path}: not a token shard (column '{name}' is not of type {expected})")
    tokens = pc.list_flatten(documents["tokens"])
    extremes = pc.min_max(tokens, skip_nulls=False).as_py()
    if len(tokens) and not (extremes["min"] is not None and 0 <= extremes["min"] <= extremes["max"] < vocab_size):
        raise DataError(f"{path}: damaged token shard (token ids outside 0 to {vocab_size - 1})")
    return documents
