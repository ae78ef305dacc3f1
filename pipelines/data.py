"""Token shards on disk, and the batches that a trainer reads from them.

A data folder holds ``manifest.json``, ``tokenizer.json`` and the shards ``{train,validation}/*.parquet`` of
:data:`SHARD_SCHEMA`: one row per document, or per numbered piece of a long one, which readers take for a document of
its own. ``tokens`` begin with BOS; ``answer_starts`` and ``answer_ends`` are the spans [start, end) of a retrieval
document's answers, empty for text. Readers cut documents into training rows of ``sequence_length`` (L) predictions:

* ``tokens`` int32 [L + 1]: inputs are ``tokens[:-1]``, targets ``tokens[1:]``; padded with id 0;
* ``target_kind`` uint8 [L]: a :class:`TargetKind` per target.

A row never crosses documents. Consecutive rows of one document share one token, so every token but the first is
predicted exactly once.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Generator, Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydantic
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict

from model.errors import DataError

if TYPE_CHECKING:
    import ray.data
    import torch

# torch is imported where it is used: Ray's reading tasks import this module to cut rows, and need none of it.
Row = dict[str, np.ndarray]
Batch = dict[str, "torch.Tensor"]
Split = Literal["train", "validation"]
Kind = Literal["text", "mqar", "needle"]

SPLITS: tuple[Split, ...] = ("train", "validation")
KINDS: tuple[Kind, ...] = ("text", "mqar", "needle")
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MIN_TARGETS = 8
"""Rows with fewer real targets than this are dropped: they would be nearly all padding."""
SHUFFLE_BUFFER_TOKENS = 2_000_000
"""How many tokens of a Ray shard are shuffled among one another; bounds the buffer's memory at any length."""
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


class TargetKind(IntEnum):
    """What a target token is, so that a loss can weigh it and a metric can count it."""

    PADDING = 0
    TEXT = 1
    ANSWER = 2
    CONTEXT = 3
    """A token of a retrieval document that is no answer."""


# --- manifest


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
    shards: tuple[Shard, ...]


class Manifest(_Record):
    """What ``manifest.json`` says; ``settings`` are all those that determined the shards."""

    format: int
    settings: dict[str, Any]
    tokenizer: str
    vocab_size: int
    bos_id: int
    eos_id: int
    sequence_length: int
    splits: dict[Split, SplitManifest]


def read_manifest(folder: str | Path, verify: bool = False) -> Manifest:
    """Read and check a data folder: every shard is there and has its size, with ``verify`` also its SHA-256.

    Raises DataError naming the file that is missing or damaged.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; run the prepare step first") from error
    try:
        manifest = Manifest.model_validate_json(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: damaged manifest ({f'{place}: ' if place else ''}{first['msg']})") from error
    if manifest.format != FORMAT_VERSION:
        raise DataError(f"{path}: has format {manifest.format}, this version reads format {FORMAT_VERSION}")
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
            raise DataError(f"{path}: damaged token shard ({size} bytes where the manifest says {shard.bytes})")
        if verify and file_sha256(path) != shard.sha256:
            raise DataError(f"{path}: damaged token shard (its SHA-256 is not the manifest's)")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- rows


def count_rows(lengths: ArrayLike, sequence_length: int) -> np.ndarray:
    """How many training rows documents of ``lengths`` tokens [N] give: int64 [N]."""
    targets = np.asarray(lengths, dtype=np.int64) - 1
    rows = -(-targets // sequence_length)
    rest = targets - (rows - 1) * sequence_length
    return np.maximum(rows - (rest < min(MIN_TARGETS, sequence_length)), 0)


def cut_rows(documents: pa.Table, sequence_length: int) -> Row:
    """Cut documents into rows, in order: {"tokens": int32 [R, L + 1], "target_kind": uint8 [R, L]}."""
    tokens, lengths = _flatten(documents["tokens"])
    starts = np.cumsum(lengths) - lengths
    is_text = pc.equal(documents["kind"], "text").to_numpy(zero_copy_only=False)
    kinds = np.repeat(np.where(is_text, TargetKind.TEXT, TargetKind.CONTEXT).astype(np.uint8), lengths)
    answer_starts, answer_counts = _flatten(documents["answer_starts"])
    answer_ends, _ = _flatten(documents["answer_ends"])
    if len(answer_starts):
        document_starts = np.repeat(starts, answer_counts)
        edges = np.zeros(len(tokens) + 1, dtype=np.int64)
        np.add.at(edges, answer_starts + document_starts, 1)
        np.add.at(edges, answer_ends + document_starts, -1)
        kinds[np.cumsum(edges[:-1]) > 0] = TargetKind.ANSWER

    rows_per_document = count_rows(lengths, sequence_length)
    document = np.repeat(np.arange(len(lengths)), rows_per_document)
    first_row = np.cumsum(rows_per_document) - rows_per_document
    offset = (np.arange(len(document)) - first_row[document]) * sequence_length
    position = np.arange(sequence_length + 1)
    real = position < (lengths[document] - offset)[:, None]
    index = np.where(real, (starts[document] + offset)[:, None] + position, 0)
    return {
        "tokens": np.where(real, tokens[index], np.int32(0)),
        "target_kind": np.where(real, kinds[index], np.uint8(TargetKind.PADDING))[:, 1:],
    }


def _flatten(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A list column as its flat values and the length of each list (int64)."""
    values = pc.list_flatten(column).to_numpy()
    return values, pc.list_value_length(column).to_numpy().astype(np.int64)


def _shard_tables(path: Path) -> Iterator[pa.Table]:
    """The row groups of one shard, one in memory at a time. Raises DataError naming a damaged file."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=READ_COLUMNS, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged token shard ({' '.join(str(error).split())})") from error


def local_rows(
    folder: str | Path,
    split: Split,
    sequence_length: int,
    kinds: Iterable[Kind] | None = None,
    limit: int | None = None,
    seed: int = 0,
    shuffle: bool = False,
) -> Iterator[Row]:
    """Read rows in this process, without Ray: {"tokens": int32 [L + 1], "target_kind": uint8 [L]} each.

    ``kinds`` keeps only documents of these kinds. Unshuffled rows come in the shards' order, one row group in memory
    at a time. ``shuffle`` permutes the shards, and the rows within each shard, which is then held in memory whole.
    Raises DataError for a missing or damaged folder or shard.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    wanted = None if kinds is None else pa.array(_known_kinds(kinds))
    paths = [folder / shard.file for shard in manifest.splits[split].shards]
    return itertools.islice(_rows(paths, sequence_length, wanted, seed if shuffle else None), limit)


def _rows(paths: list[Path], sequence_length: int, wanted: pa.Array | None, seed: int | None) -> Iterator[Row]:
    rng = np.random.default_rng(seed)
    if seed is not None:
        paths = [paths[i] for i in rng.permutation(len(paths))]
    for path in paths:
        groups = (
            cut_rows(table if wanted is None else table.filter(pc.is_in(table["kind"], wanted)), sequence_length)
            for table in _shard_tables(path)
        )
        if seed is None:
            for rows in groups:
                yield from _single_rows(rows, range(len(rows["tokens"])))
        else:
            parts = list(groups)
            rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            yield from _single_rows(rows, rng.permutation(len(rows["tokens"])))


def _single_rows(rows: Row, order: Iterable[int]) -> Iterator[Row]:
    for i in order:
        yield {name: values[i] for name, values in rows.items()}


def _known_kinds(kinds: Iterable[Kind]) -> list[Kind]:
    kinds = list(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise DataError(f"kinds: '{kind}' is not one of {', '.join(KINDS)}")
    return kinds


# --- Ray


def train_dataset(folder: str | Path, sequence_length: int, seed: int = 0, verify: bool = True) -> ray.data.Dataset:
    """The training rows as a lazy ``ray.data.Dataset``, for ``datasets={"train": ...}`` of a Ray Train trainer.

    Shards come in an order drawn from ``seed``, rows in their shard's order, each exactly once.
    ``verify`` checks the SHA-256 of every shard here, so that a damaged one is named before workers start.
    Raises DataError.
    """
    import ray.data

    folder = Path(folder).absolute()  # workers run in folders of their own
    paths = [str(folder / shard.file) for shard in read_manifest(folder, verify=verify).splits["train"].shards]
    random.Random(seed).shuffle(paths)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # The list of paths is already shuffled; Ray reads it in the order given.
    shards = ray.data.read_parquet(paths, columns=READ_COLUMNS)
    cut = functools.partial(cut_rows, sequence_length=sequence_length)
    return shards.map_batches(cut, batch_size=None, batch_format="pyarrow")


# --- batches


def batches(rows: Iterable[Row], batch_rows: int, drop_last: bool = False) -> Generator[Batch, None, None]:
    """Stack rows into {"tokens": int64 [B, L + 1], "target_kind": uint8 [B, L]}.

    The last batch may be smaller; ``drop_last`` leaves it out.
    """
    import torch

    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, batch_rows)):
        if len(chunk) < batch_rows and drop_last:
            return
        yield {
            "tokens": torch.from_numpy(np.stack([row["tokens"] for row in chunk])).long(),
            "target_kind": torch.from_numpy(np.stack([row["target_kind"] for row in chunk])),
        }


class TrainBatches:
    """An endless iterator of training batches, reshuffled every epoch.

    ``epoch`` and ``batch`` are the position of the next batch: store both in a checkpoint, and pass them to
    :func:`train_batches` as ``epoch`` and ``skip`` to go on with exactly the batches that would have followed.
    """

    def __init__(self, open_epoch: Callable[[int], Generator[Batch, None, None]], epoch: int, skip: int):
        self._open_epoch = open_epoch
        self._batches = open_epoch(epoch)
        self.epoch = epoch
        self.batch = 0
        for _ in range(skip):
            next(self)

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches, None)
        if batch is None:
            if self.batch == 0:
                raise DataError("train split: one epoch holds fewer rows than train.batch_rows asks of each worker")
            self.epoch, self.batch = self.epoch + 1, 0
            self._batches = self._open_epoch(self.epoch)
            return next(self)
        self.batch += 1
        return batch

    def close(self) -> None:
        """Stop reading. A Ray shard's execution ends here instead of at some later garbage collection."""
        self._batches.close()


def train_batches(
    source: ray.data.DataIterator | str | Path,
    sequence_length: int,
    batch_rows: int,
    seed: int = 0,
    epoch: int = 0,
    skip: int = 0,
) -> TrainBatches:
    """Endless batches of ``batch_rows`` rows from a data folder, or from a worker's ``get_dataset_shard("train")``.

    Each epoch is shuffled anew from (``seed``, epoch); rows that do not fill a batch are dropped at its end.
    The stream begins ``skip`` batches after the start of ``epoch``; skipped batches are read and thrown away.
    A Ray shard's batches are placed on the worker's device, a folder's on the CPU.
    Raises DataError when an epoch has no full batch, or for a damaged folder.
    """

    if isinstance(source, str | Path):
        open_epoch = functools.partial(_folder_epoch, source, sequence_length, batch_rows, seed)
    else:
        open_epoch = functools.partial(_shard_epoch, source, sequence_length, batch_rows, seed)
    return TrainBatches(open_epoch, epoch, skip)


def _folder_epoch(
    folder: str | Path, sequence_length: int, batch_rows: int, seed: int, epoch: int
) -> Generator[Batch, None, None]:
    rows = local_rows(folder, "train", sequence_length, seed=_epoch_seed(seed, epoch), shuffle=True)
    return batches(rows, batch_rows, drop_last=True)


def _shard_epoch(
    shard: ray.data.DataIterator, sequence_length: int, batch_rows: int, seed: int, epoch: int
) -> Generator[Batch, None, None]:
    import torch

    yield from shard.iter_torch_batches(
        batch_size=batch_rows,
        dtypes={"tokens": torch.int64, "target_kind": torch.uint8},
        drop_last=True,
        local_shuffle_buffer_size=max(2 * batch_rows, SHUFFLE_BUFFER_TOKENS // sequence_length),
        local_shuffle_seed=_epoch_seed(seed, epoch),
    )


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
