"""Token shards on disk, and the batches that a trainer reads from them.

A data folder holds ``manifest.json``, ``tokenizer.json`` and the shards ``{train,validation}/*.parquet`` of
:data:`SHARD_SCHEMA`: one row per document, or per numbered piece of a long one, which readers take for a document of
its own. ``tokens`` begin with BOS; ``answer_starts`` and ``answer_ends`` are the spans [start, end) of a retrieval
document's answers, empty for text. Readers cut documents into training rows of ``sequence_length`` (L) predictions:

* ``tokens`` int32 [L + 1]: inputs are ``tokens[:-1]``, targets ``tokens[1:]``; padded with id 0;
* ``target_kind`` uint8 [L]: a :class:`TargetKind` per target;
* ``positions`` int32 [L]: the place of each input in its document: 0 where one begins, -1 on padding.

A document fills as many rows as it can, each alone, and consecutive ones share a token. What remains of it, less than
a row, is packed into one row with the remains of other documents of its kind and shard, unless the folder was prepared
without packing. There it counts as a document of its own, from position 0. So every token but a document's first is
predicted exactly once; the input at a document's end, where the next one's first token follows, has no target.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import itertools
import random
from collections import deque
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
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
MIN_PIECE = 2
"""Tokens of the smallest document that has anything to predict."""
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
    targets: dict[Kind, int]
    """Tokens that are predicted: all but the first of every document, or piece of a long one."""
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
    packing: bool
    """Whether a row may hold several short documents."""
    splits: dict[Split, SplitManifest]


class _Format(BaseModel):
    """What the manifests of all versions have in common."""

    format: int


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
        version = _Format.model_validate_json(content).format
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: has format {version}, this version reads format {FORMAT_VERSION}")
        manifest = Manifest.model_validate_json(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: damaged manifest ({f'{place}: ' if place else ''}{first['msg']})") from error
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


def count_rows(lengths: ArrayLike, sequence_length: int, packing: bool = True) -> int:
    """How many training rows documents of ``lengths`` tokens [N] give, all of one kind and in one shard."""
    _, _, sizes = _pieces(np.asarray(lengths, dtype=np.int64), sequence_length)
    rows = _assign_rows(sizes, np.zeros(len(sizes), dtype=np.int64), sequence_length + 1, packing)
    return len(np.unique(rows))


def cut_rows(documents: pa.Table, sequence_length: int, packing: bool = True) -> Row:
    """Cut a shard's documents into rows, in the order of each row's first document:
    {"tokens": int32 [R, L + 1], "target_kind": uint8 [R, L], "positions": int32 [R, L]}.

    A retrieval document that does not fit into one row is left out: cut, its answers would stand apart from its facts.
    """
    whole = pc.less_equal(pc.list_value_length(documents["tokens"]), sequence_length + 1)
    documents = documents.filter(pc.or_(pc.equal(documents["kind"], "text"), whole))
    tokens, lengths = _flatten(documents["tokens"])
    starts = np.cumsum(lengths) - lengths
    kind = pc.index_in(documents["kind"], pa.array(KINDS)).to_numpy()
    is_text = kind == KINDS.index("text")
    kinds = np.repeat(np.where(is_text, TargetKind.TEXT, TargetKind.CONTEXT).astype(np.uint8), lengths)
    answer_starts, answer_counts = _flatten(documents["answer_starts"])
    answer_ends, _ = _flatten(documents["answer_ends"])
    if len(answer_starts):
        document_starts = np.repeat(starts, answer_counts)
        edges = np.zeros(len(tokens) + 1, dtype=np.int64)
        np.add.at(edges, answer_starts + document_starts, 1)
        np.add.at(edges, answer_ends + document_starts, -1)
        kinds[np.cumsum(edges[:-1]) > 0] = TargetKind.ANSWER

    document, offset, sizes = _pieces(lengths, sequence_length)
    _, first, row = np.unique(
        _assign_rows(sizes, kind[document], sequence_length + 1, packing), return_index=True, return_inverse=True
    )
    row = np.argsort(np.argsort(first))[row]
    # Rows are filled from their start: read row after row, their real places are the pieces' tokens in this order.
    filled = np.bincount(row, weights=sizes, minlength=len(first))
    real = np.arange(sequence_length + 1) < filled[:, None]
    order = np.argsort(row, kind="stable")
    sizes, begins = sizes[order], (starts[document] + offset)[order]
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of every token in its piece
    source = np.repeat(begins, sizes) + place
    row_tokens = np.zeros(real.shape, dtype=np.int32)
    row_kinds = np.full(real.shape, TargetKind.PADDING, dtype=np.uint8)
    positions = np.full(real.shape, -1, dtype=np.int32)
    row_tokens[real] = tokens[source]
    row_kinds[real] = np.where(place == 0, np.uint8(TargetKind.PADDING), kinds[source])
    positions[real] = place
    return {"tokens": row_tokens, "target_kind": row_kinds[:, 1:], "positions": positions[:, :-1]}


def _pieces(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of ``lengths`` tokens int64 [N] as pieces of at most L + 1 tokens, consecutive ones sharing a token:
    document, offset and size of every piece, int64 [P]. A document of one token has nothing to predict and no piece."""
    per_document = -(-np.maximum(lengths - 1, 0) // sequence_length)
    document = np.repeat(np.arange(len(lengths)), per_document)
    first = np.cumsum(per_document) - per_document
    offset = (np.arange(len(document)) - first[document]) * sequence_length
    return document, offset, np.minimum(lengths[document] - offset, sequence_length + 1)


def _assign_rows(sizes: np.ndarray, kinds: np.ndarray, capacity: int, packing: bool) -> np.ndarray:
    """The row of every piece, named by the largest piece in it: int64 [P].

    Best fit decreasing: from the largest piece down, each goes into the row of its kind that it leaves the least room
    in. Rows hold ``capacity`` tokens and documents of one kind only, so that reading one kind gives the same rows.
    """
    rows = np.arange(len(sizes))
    if not packing:
        return rows
    for kind in np.unique(kinds):
        small = np.flatnonzero((kinds == kind) & (sizes <= capacity - MIN_PIECE))
        room_left: list[tuple[int, int]] = []  # (tokens, row) in ascending order
        for piece in small[np.argsort(-sizes[small], kind="stable")].tolist():
            size = int(sizes[piece])
            best = bisect.bisect_left(room_left, (size, 0))
            room, row = room_left.pop(best) if best < len(room_left) else (capacity, piece)
            rows[piece] = row
            if room - size >= MIN_PIECE:
                bisect.insort(room_left, (room - size, row))
    return rows


def _flatten(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A list column as its flat values and the length of each list (int64)."""
    values = pc.list_flatten(column).to_numpy()
    return values, pc.list_value_length(column).to_numpy().astype(np.int64)


def _read_shard(path: Path, vocab_size: int) -> pa.Table:
    """A shard's documents. Raises DataError naming a damaged file."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            documents = file.read(columns=READ_COLUMNS, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged token shard ({' '.join(str(error).split())})") from error
    for name in READ_COLUMNS:
        expected = SHARD_SCHEMA.field(name).type
        if name not in documents.column_names or documents.schema.field(name).type != expected:
            raise DataError(f"{path}: not a token shard (its column '{name}' is not of type {expected})")
    tokens = pc.list_flatten(documents["tokens"])
    extremes = pc.min_max(tokens, skip_nulls=False).as_py()
    if len(tokens) and not (extremes["min"] is not None and 0 <= extremes["min"] <= extremes["max"] < vocab_size):
        raise DataError(f"{path}: damaged token shard (not all its tokens are numbers from 0 to {vocab_size - 1})")
    return documents


def local_rows(
    folder: str | Path,
    split: Split,
    sequence_length: int,
    kinds: Iterable[Kind] | None = None,
    limit: int | None = None,
    seed: int = 0,
    shuffle: bool = False,
) -> Iterator[Row]:
    """Read rows in this process, without Ray, one shard in memory at a time:
    {"tokens": int32 [L + 1], "target_kind": uint8 [L], "positions": int32 [L]} each.

    ``kinds`` keeps only documents of these kinds. Unshuffled rows come in the shards' order; ``shuffle`` permutes the
    shards, and the rows within each shard.
    Raises DataError for a missing or damaged folder or shard.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    wanted = None if kinds is None else pa.array(_known_kinds(kinds))
    paths = [folder / shard.file for shard in manifest.splits[split].shards]
    rows = _rows(paths, manifest, sequence_length, wanted, seed if shuffle else None)
    return itertools.islice(rows, limit)


def _rows(
    paths: list[Path], manifest: Manifest, sequence_length: int, wanted: pa.Array | None, seed: int | None
) -> Iterator[Row]:
    rng = np.random.default_rng(seed)
    if seed is not None:
        paths = [paths[i] for i in rng.permutation(len(paths))]
    for path in paths:
        documents = _read_shard(path, manifest.vocab_size)
        if wanted is not None:
            documents = documents.filter(pc.is_in(documents["kind"], wanted))
        rows = cut_rows(documents, sequence_length, manifest.packing)
        count = len(rows["tokens"])
        for i in range(count) if seed is None else rng.permutation(count):
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
    manifest = read_manifest(folder, verify=verify)
    paths = [str(folder / shard.file) for shard in manifest.splits["train"].shards]
    random.Random(seed).shuffle(paths)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # A shard is packed as a whole. Ray's own Parquet reader may cut one into several blocks, so tasks take paths.
    shards = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=len(paths))
    cut = functools.partial(
        _shard_rows, sequence_length=sequence_length, packing=manifest.packing, vocab_size=manifest.vocab_size
    )
    return shards.map_batches(cut, batch_size=1, batch_format="numpy")


def _shard_rows(
    shards: dict[str, np.ndarray], sequence_length: int, packing: bool, vocab_size: int
) -> Iterator[Row]:
    for path in shards["path"]:
        yield cut_rows(_read_shard(Path(path), vocab_size), sequence_length, packing)


# --- batches


def batches(rows: Iterable[Row], batch_rows: int, drop_last: bool = False) -> Generator[Batch, None, None]:
    """Stack rows into {"tokens": int64 [B, L + 1], "target_kind": uint8 [B, L], "positions": int64 [B, L]}.

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
            "positions": torch.from_numpy(np.stack([row["positions"] for row in chunk])).long(),
        }


class TrainBatches:
    """An endless iterator of training batches, reshuffled every epoch.

    ``epoch`` and ``batch`` are the position of the next batch: store both in a checkpoint, and pass them to
    :func:`train_batches` as ``epoch`` and ``skip`` to go on with exactly the batches that would have followed.
    Raises DataError when an epoch has no full batch.
    """

    def __init__(self, open_epoch: Callable[[int], Generator[Batch, None, None]], epoch: int, skip: int):
        self._read = self._endless(open_epoch, epoch)
        self._ahead: deque[tuple[Batch, int, int]] = deque()
        self.epoch = epoch
        self.batch = 0
        for _ in range(skip):
            next(self)

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        batch, self.epoch, self.batch = self._ahead.popleft() if self._ahead else next(self._read)
        return batch

    def ahead(self, count: int) -> list[Batch]:
        """The next ``count`` batches, which stay the next ones."""
        while len(self._ahead) < count:
            self._ahead.append(next(self._read))
        return [batch for batch, _, _ in itertools.islice(self._ahead, count)]

    def close(self) -> None:
        """Stop reading. A Ray shard's execution ends here instead of at some later garbage collection."""
        self._read.close()

    @staticmethod
    def _endless(
        open_epoch: Callable[[int], Generator[Batch, None, None]], epoch: int
    ) -> Generator[tuple[Batch, int, int], None, None]:
        """Batches, each with the position after it."""
        while True:
            number = 0
            with contextlib.closing(open_epoch(epoch)) as batches:
                for number, batch in enumerate(batches, 1):
                    yield batch, epoch, number
            if not number:
                raise DataError("train split: one epoch holds fewer rows than train.batch_rows asks of each worker")
            epoch += 1


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
        dtypes={"tokens": torch.int64, "target_kind": torch.uint8, "positions": torch.int64},
        drop_last=True,
        local_shuffle_buffer_size=max(2 * batch_rows, SHUFFLE_BUFFER_TOKENS // sequence_length),
        local_shuffle_seed=_epoch_seed(seed, epoch),
    )


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
