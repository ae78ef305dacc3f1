"""Writing of token shards, each with its share of retrieval documents.

Documents become shards in a stream: memory holds one shard. A document goes to train or validation by the hash of its
text, not by its name or place; exact duplicates are kept and go to the same split. If a split then has too little text,
as with a single document, the end of every document is held out instead. Long documents are stored as pieces of
:data:`PIECE_ROWS` training rows, which mixes shards well without a global shuffle. Pieces are numbered and carry their
document's id; each begins with BOS, and only the last ends with EOS.
"""

from __future__ import annotations

import functools
import itertools
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evals.documents.facts import reserved_ids
from model.errors import DataError
from model.tokenizer import Tokenizer
from model.wording import count
from pipelines.data.manifest import KINDS, SPLITS, HeldOut, Kind, Shard, Split, SplitManifest, file_sha256
from pipelines.data.packing import count_rows
from pipelines.data.retrieval_rows import RetrievalGenerator, StoredDocument
from pipelines.data.shards import SHARD_SCHEMA
from pipelines.data.source_files import TEXT_SUFFIXES, SourceFile
from pipelines.data.sources import SourceDocument, read_documents
from pipelines.data.tokenization import LostCharacters, encode_pieces, fingerprint, line_start, skip, truncate
from pipelines.recipe.schema import Recipe

PIECE_ROWS = 8
ROW_GROUP_TOKENS = 262_144
MIN_OF_SHARE = 0.25
"""Minimum text of a split, as a fraction of its share of all text."""
OpenText = Callable[[], Iterator[str]]


class _TooLittleTextError(DataError):
    pass


class _Part(NamedTuple):
    """A document, or the part of it that belongs to one split."""

    split: Split
    digest: bytes
    size: int
    chunks: Iterator[str]


def write_splits(
    recipe: Recipe, tokenizer: Tokenizer, files: list[SourceFile], folder: Path
) -> tuple[HeldOut, dict[Split, SplitManifest]]:
    """Write the shards of all splits into ``folder``. Raises DataError for unreadable or too little text."""
    if len(files) > 1 or files[0].path.suffix.lower() not in TEXT_SUFFIXES:  # possibly several documents
        try:
            return "documents", _write_splits(recipe, tokenizer, files, folder, _whole)
        except _TooLittleTextError:
            for split in SPLITS:
                shutil.rmtree(folder / split)
    return "ends", _write_splits(recipe, tokenizer, files, folder, _ends)


def _write_splits(
    recipe: Recipe,
    tokenizer: Tokenizer,
    files: list[SourceFile],
    folder: Path,
    divide: Callable[[OpenText, float], Iterator[_Part]],
) -> dict[Split, SplitManifest]:
    data = recipe.data
    writers = {split: _SplitWriter(recipe, tokenizer, folder, split) for split in SPLITS}
    text_bytes, lost = 0, LostCharacters(tokenizer)
    for document in read_documents(files, data.text_field):
        left = None if data.max_text_bytes is None else data.max_text_bytes - text_bytes
        before = text_bytes
        for part in divide(functools.partial(_read, document, left), data.validation_share):
            pieces = encode_pieces(tokenizer, lost.watch(part.chunks), PIECE_ROWS * data.sequence_length)
            writers[part.split].add(part.digest.hex()[:32], document.source, pieces, part.size)
            text_bytes += part.size
        if left is not None and text_bytes - before > left - 4:  # it may fall within a character of up to 4 bytes
            break
    if not text_bytes:
        raise DataError(f"data.sources: no text in {count(len(files), 'file')}")
    writers["train"].require(MIN_OF_SHARE * (1 - data.validation_share) * text_bytes)
    writers["validation"].require(MIN_OF_SHARE * data.validation_share * text_bytes)
    splits = {split: writer.finish() for split, writer in writers.items()}
    lost.report()
    return splits


def _read(document: SourceDocument, max_bytes: int | None) -> Iterator[str]:
    return truncate(document.open(), max_bytes)


def _whole(read: OpenText, validation_share: float) -> Iterator[_Part]:
    """Yield a document for the split that its hash chooses."""
    digest, size = fingerprint(read())
    if size:
        split: Split = "validation" if int.from_bytes(digest[:8]) < validation_share * 2**64 else "train"
        yield _Part(split, digest, size, read())


def _ends(read: OpenText, validation_share: float) -> Iterator[_Part]:
    """Yield a document in two parts, the last ``validation_share`` of it for validation."""
    _, size = fingerprint(read())
    cut = line_start(read(), size - round(size * validation_share))
    parts: dict[Split, OpenText] = {
        "train": lambda: truncate(read(), cut),
        "validation": lambda: skip(read(), cut),
    }
    for split, read_part in parts.items():
        digest, size = fingerprint(read_part())
        if size:
            yield _Part(split, digest, size, read_part())


class _SplitWriter:
    """Collects the text of a shard, plants retrieval documents in it, shuffles both and writes them."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, folder: Path, split: Split):
        data = recipe.data
        self._folder, self._split = folder, split
        self._sequence_length, self._packing = data.sequence_length, data.packing
        self._shard_tokens = data.shard_tokens
        # Fillers must hold neither BOS and EOS nor the characters that facts are written with.
        self._reserved_ids = [tokenizer.bos_id, tokenizer.eos_id, *reserved_ids(tokenizer)]
        self._retrieval = RetrievalGenerator(recipe, tokenizer, split)
        self._rng = np.random.default_rng([data.seed, SPLITS.index(split)])
        share = data.retrieval_share
        # With a share of 1 no text row is kept, and each is replaced by one retrieval document.
        self._keep_text = split == "validation" or share < 1
        self._retrieval_per_row = 0.0 if split == "validation" else share / (1 - share) if share < 1 else 1.0
        self._retrieval_due = float(data.retrieval_validation_documents) if split == "validation" else 0.0
        self._text: list[StoredDocument] = []
        self._pending_tokens = 0.0
        self._filler = np.empty(0, dtype=np.int32)
        self._text_bytes = 0
        self._kinds = ["text", *(kind for kind in KINDS if data.retrieval_tasks.get(kind))]
        self._documents: Counter[Kind] = Counter()
        self._rows: Counter[Kind] = Counter()
        self._tokens: Counter[Kind] = Counter()
        self._targets: Counter[Kind] = Counter()
        self._shards: list[Shard] = []
        (folder / split).mkdir()

    def add(self, document_id: str, source: str, pieces: Iterable[np.ndarray], text_bytes: int) -> None:
        """Add a text document of ``pieces``, int32 [tokens] each; write shards as they fill."""
        self._documents["text"] += 1
        self._text_bytes += text_bytes
        for piece, tokens in enumerate(pieces):
            self._text.append(StoredDocument(document_id, piece, source, "text", tokens, []))
            # An estimate that assumes full rows: the row count of the text is known once it is packed.
            rows = (len(tokens) - 1) / self._sequence_length
            retrieval_documents = self._retrieval_per_row * (rows if self._packing else math.ceil(rows))
            self._pending_tokens += len(tokens) * self._keep_text + retrieval_documents * self._sequence_length
            if self._pending_tokens >= self._shard_tokens:
                self._close_shard()

    def require(self, text_bytes: float) -> None:
        """Raise DataError if the split has less text."""
        if self._text_bytes < text_bytes:
            raise self._too_little_text()

    def finish(self) -> SplitManifest:
        """Write the last shard. Raises DataError if the split has no rows, or no text for its retrieval documents."""
        if self._text:
            self._close_shard()
        rows = self._rows["text"] if self._keep_text else self._rows.total()
        if not rows or self._retrieval_due >= 1:
            raise self._too_little_text()
        return SplitManifest(
            text_bytes=self._text_bytes,
            documents={kind: self._documents[kind] for kind in self._kinds},
            rows={kind: self._rows[kind] for kind in self._kinds},
            tokens={kind: self._tokens[kind] for kind in self._kinds},
            targets={kind: self._targets[kind] for kind in self._kinds},
            shards=tuple(self._shards),
        )

    def _too_little_text(self) -> DataError:
        change = "lower" if self._split == "train" else "raise"
        return _TooLittleTextError(
            f"data.sources: too little text for {self._split} ({count(self._text_bytes, 'byte')}, for rows of "
            f"{self._sequence_length} tokens); add text, {change} data.validation_share, or lower data.sequence_length"
        )

    def _close_shard(self) -> None:
        stored = list(self._text) if self._keep_text else []
        self._retrieval_due += self._retrieval_per_row * self._count_rows(len(piece.tokens) for piece in self._text)
        text = np.concatenate([piece.tokens for piece in self._text])
        text = text[~np.isin(text, self._reserved_ids)]
        if len(text) >= self._sequence_length:
            self._filler = text
        if len(self._filler):
            while self._retrieval_due >= 1:
                stored.append(self._retrieval.generate(self._filler))
                self._retrieval_due -= 1
        self._text, self._pending_tokens = [], 0.0
        if stored:
            self._write([stored[i] for i in self._rng.permutation(len(stored))])

    def _count_rows(self, lengths: Iterable[int]) -> int:
        return count_rows(np.fromiter(lengths, dtype=np.int64), self._sequence_length, self._packing)

    def _write(self, stored: list[StoredDocument]) -> None:
        name = f"{self._split}/{len(self._shards):05d}.parquet"
        path = self._folder / name
        lengths = np.array([len(item.tokens) for item in stored])
        group = np.cumsum(lengths) // ROW_GROUP_TOKENS
        edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(stored)]
        with pq.ParquetWriter(path, SHARD_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            for start, end in itertools.pairwise(edges):
                writer.write_table(_to_table(stored[start:end]))
        kinds = np.array([item.kind for item in stored])
        for kind in self._kinds:
            of_kind = lengths[kinds == kind]
            self._rows[kind] += self._count_rows(of_kind)
            self._tokens[kind] += int(of_kind.sum())
            self._targets[kind] += int(of_kind.sum()) - len(of_kind)
            if kind != "text":
                self._documents[kind] += len(of_kind)
        self._shards.append(
            Shard(
                file=name,
                bytes=path.stat().st_size,
                sha256=file_sha256(path),
                documents=len(stored),
                tokens=int(lengths.sum()),
            )
        )


def _to_table(stored: list[StoredDocument]) -> pa.Table:
    offsets = np.cumsum([0, *(len(item.tokens) for item in stored)], dtype=np.int32)
    tokens = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([item.tokens for item in stored])))
    columns = [
        pa.array([item.document_id for item in stored]),
        pa.array([item.piece for item in stored], type=pa.int32()),
        pa.array([item.source for item in stored]),
        pa.array([item.kind for item in stored]),
        tokens,
        pa.array([[start for start, _ in item.answers] for item in stored], type=pa.list_(pa.int32())),
        pa.array([[end for _, end in item.answers] for item in stored], type=pa.list_(pa.int32())),
    ]
    return pa.Table.from_arrays(columns, schema=SHARD_SCHEMA)
